"""Effective receptive fields, before and after training: figure, table and JSON.

python analyze/erf.py --models vmamba_tiny resnet50 --size 1024 --images data/imagenet/val
python analyze/erf.py --models vmamba_digits --weights output/vmamba_digits/default/best.pth --size 32
"""

import argparse
import sys

from vmamba.analysis.options import positive
from vmamba.analysis.receptive_field import erf
from vmamba.runtime.cli import exit_code

MODELS = ["vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50", "deit_small_patch16_224"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="of vmamba.list_models() or timm's")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="FILE",
        help="a checkpoint a model, in order; -: random weights alone; pretrained (timm's models): downloaded",
    )
    parser.add_argument("--size", type=positive, default=224, help="side of the images, pixels")
    parser.add_argument("--images", dest="images_from", metavar="DIR", help="default: scikit-learn's photographs")
    parser.add_argument("--num-images", type=positive, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="output/erf", help="folder for figure, table, JSON and maps")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: erf(**vars(args))))
