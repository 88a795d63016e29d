"""Multiply-adds, activations and parameters against image size; with weights and a data set, accuracy too.

python analyze/scale.py --models vmamba_tiny swin_tiny_patch4_window7_224 --sizes 224 512 1024
python analyze/scale.py --models vmamba_digits --weights output/vmamba_digits/default/best.pth \\
    --cfg configs/vmamba_digits.yaml --sizes 16 24 32 48 64
"""

import argparse
import sys

from vmamba.analysis.options import positive
from vmamba.analysis.scaling import scale
from vmamba.runtime.cli import exit_code

MODELS = ["vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="of vmamba.list_models() or timm's")
    parser.add_argument("--sizes", nargs="+", type=positive, default=[224, 448, 672, 896], help="sides, pixels")
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE", help="a checkpoint a model, in order")
    parser.add_argument("--cfg", metavar="FILE", help="config whose data set gives the accuracy")
    parser.add_argument("--data-path", metavar="DIR", help="where that data set is")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="output/scale", help="folder for table, JSON and plots")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: scale(**vars(args))))
