"""The modules of a model with parameters and shapes, and its stages with their multiply-adds.

python analyze/summary.py vmamba_tiny --size 224 --depth 4
"""

import argparse
import sys

from vmamba.analysis.options import positive
from vmamba.analysis.summary import summary
from vmamba.runtime.cli import exit_code


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vmamba_tiny", help="of vmamba.list_models() or timm's")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint whose model it is")
    parser.add_argument("--size", type=positive, default=224, help="side of the images, pixels")
    parser.add_argument("--depth", type=positive, default=2, help="names in a module's path")
    parser.add_argument("--output", metavar="FILE", help="write it there too")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: summary(**vars(args))))
