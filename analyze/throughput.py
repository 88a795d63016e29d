"""Images a second, latency and peak memory of models side by side, ours or timm's.

python analyze/throughput.py --models vmamba_tiny swin_tiny_patch4_window7_224 --sizes 224 --batch-sizes auto
"""

from _door import Parser, or_word, whole

from vmamba.analysis.speed import CPU_BATCH, DTYPES, LARGEST_BATCH, MODES, throughput
from vmamba.models.compilation import COMPILE_MODES


def parser() -> Parser:
    parser = Parser(throughput, __doc__)
    parser.flag("--models")
    parser.flag("--sizes")
    parser.flag(
        "--batch-sizes",
        nargs="+",
        type=or_word("auto", whole(1, 2**20)),
        metavar="IMAGES",
        help=f"numbers, or auto: the largest power of two that fits into the GPU's memory, up to {LARGEST_BATCH}; "
        f"{CPU_BATCH} on a CPU (default: auto)",
    )
    parser.flag("--dtypes", nargs="+", choices=DTYPES, help="float32, or of autocast")
    parser.flag("--modes", nargs="+", choices=MODES, help="train: with backward and AdamW")
    parser.flag("--relative-to", metavar="MODEL", help="the model that ratios are given to (default: the first)")
    parser.flag(
        "--compile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        help="torch.compile every model; cudagraphs launches its kernels as they are as CUDA graphs (default: not)",
    )
    parser.flag("--channels-last", action="store_true", help="channels-last images and weights of convolutions")
    parser.flag("--backend", help="of our models' scans")
    parser.flag("--warm-up", type=whole(1), metavar="STEPS", help="steps before the timed ones")
    parser.flag("--repeats", type=whole(1), metavar="STEPS", help="timed steps, of which the median counts")
    parser.flag("--device")
    parser.flag("--output")
    parser.flag("--markdown", metavar="FILE", help="write the table there too (default: only into the folder)")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
