"""The scan as attention: which pixels reach a query pixel along each route, over the image; and C . B alone.

python analyze/activation_map.py photo.jpg --model vmamba_tiny --weights vmamba_tiny.pth --layer 2.8 --at 0.5,0.3
"""

import argparse
import sys

from vmamba.analysis.attention import activation_map
from vmamba.analysis.options import place, positive
from vmamba.runtime.cli import exit_code


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="default: scikit-learn's photograph of a flower")
    parser.add_argument("--model", default="vmamba_tiny", help="of vmamba.list_models()")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint; default: random weights")
    parser.add_argument("--size", type=positive, default=224, help="side of the image, pixels")
    parser.add_argument("--layer", default="1.1", help="stage.block, counted from zero")
    parser.add_argument("--at", type=place, default=(0.5, 0.3), metavar="X,Y", help="the query, shares of the sides")
    parser.add_argument("--channels", nargs="+", default=["mean"], help="mean of all, or a list of numbers")
    parser.add_argument("--matrix", action="store_true", help="also write the weights of all queries")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="output/activation_map", help="folder for figure and numbers")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: activation_map(**vars(args))))
