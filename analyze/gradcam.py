"""Grad-CAM: where the image speaks for a class, at the output of chosen blocks.  Needs pip install -e '.[analysis]'.

python analyze/gradcam.py photo.jpg --model vmamba_tiny --weights vmamba_tiny.pth --layers 2.8 3.1
"""

import argparse
import sys

from vmamba.analysis.gradcam import gradcam
from vmamba.analysis.options import positive
from vmamba.runtime.cli import exit_code


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="default: scikit-learn's photograph of a flower")
    parser.add_argument("--model", default="vmamba_tiny", help="of vmamba.list_models()")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint; default: random weights")
    parser.add_argument("--size", type=positive, default=224, help="side of the image, pixels")
    parser.add_argument("--layers", nargs="+", default=["1.1", "3.1"], help="stage.block, counted from zero")
    parser.add_argument("--target", type=int, metavar="CLASS", help="default: the one predicted")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="output/gradcam", help="folder for figure and maps")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: gradcam(**vars(args))))
