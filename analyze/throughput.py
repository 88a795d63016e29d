"""Images a second, latency and peak memory of models side by side, ours or timm's.

python analyze/throughput.py --models vmamba_tiny swin_tiny_patch4_window7_224 --sizes 224 --batch-sizes auto
"""

import argparse
import sys

from vmamba.analysis.options import positive
from vmamba.analysis.speed import DTYPES, LARGEST_BATCH, MODES, throughput
from vmamba.models.compilation import COMPILE_MODES
from vmamba.runtime.cli import exit_code


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224"])
    parser.add_argument("--sizes", nargs="+", type=positive, default=[224], help="sides of the images, pixels")
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        default=["auto"],
        help=f"numbers; auto: the largest power of two that fits, up to {LARGEST_BATCH}",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="float32, or of autocast")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["forward"], help="train: with backward and AdamW")
    parser.add_argument("--relative-to", metavar="MODEL", help="the model that ratios are given to; default: the first")
    parser.add_argument(
        "--compile", nargs="?", const="default", choices=COMPILE_MODES,
        help="torch.compile every model; cudagraphs launches its kernels as they are as CUDA graphs",
    )  # fmt: skip
    parser.add_argument("--channels-last", action="store_true", help="channels-last convolution weights")
    parser.add_argument("--backend", default="auto", help="of our models' scans")
    parser.add_argument("--warm-up", type=positive, default=3, help="steps before the timed ones")
    parser.add_argument("--repeats", type=positive, default=10, help="timed steps, of which the median counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="output/throughput", help="folder for table, JSON and plots")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there too")
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: throughput(**vars(args))))
