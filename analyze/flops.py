"""Parameters, multiply-adds and activations, no GPU needed: table, Markdown and JSON.

python analyze/flops.py
python analyze/flops.py --models vmamba_tiny swin_tiny_patch4_window7_224 --sizes 224
"""

import argparse
import sys

from vmamba.analysis.complexity import count
from vmamba.models.variants import list_models
from vmamba.runtime.cli import exit_code

PEERS = [
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = [name for name in list_models() if name != "vmamba_digits"]
    parser.add_argument("--models", nargs="+", default=[*ours, *PEERS], help="of vmamba.list_models() or timm's")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="sides of the images, pixels")
    parser.add_argument("--output", default="output/flops", help="folder for flops.md and flops.json")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: count(**vars(args))))
