"""Loss, accuracy, learning rate and gradient norm of runs over each other.

python analyze/curves.py output/vmamba_digits/default output/vmamba_digits/other --by time
"""

import argparse
import sys

from vmamba.analysis.curves import curves
from vmamba.analysis.options import positive
from vmamba.runtime.cli import exit_code


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a text log of Swin's kind")
    parser.add_argument("--by", choices=("epoch", "time"), default="epoch")
    parser.add_argument("--smooth", type=positive, default=10, help="logged steps a point of the gradient norm")
    parser.add_argument("--output", default="output/curves", help="folder for figure and numbers")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: curves(**vars(args))))
