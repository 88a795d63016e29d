"""Our models beside Swin-T and ConvNeXt-T, each in the fastest of its ways: the README's table of speed.

python analyze/peers.py --page docs/throughput-gpu.md
"""

from _door import Parser, whole

from vmamba.analysis.peers import AS_IT_IS, peers
from vmamba.analysis.speed import DTYPES
from vmamba.models.compilation import COMPILE_MODES


def parser() -> Parser:
    parser = Parser(peers, __doc__)
    parser.flag("--models")
    parser.flag("--ways", nargs="+", choices=(AS_IT_IS, *COMPILE_MODES), help="as it is, or as compiled")
    parser.flag("--size")
    parser.flag("--batch", type=whole(2, 2**20), metavar="IMAGES", help="of forward and training")
    parser.flag("--dtype", choices=DTYPES, help="float32, or of autocast")
    parser.flag("--warm-up", type=whole(1), metavar="STEPS", help="steps before the timed ones")
    parser.flag("--repeats", type=whole(1), metavar="STEPS", help="timed steps, of which the median counts")
    parser.flag("--device")
    parser.flag("--output")
    parser.flag("--page")
    return parser


if __name__ == "__main__":
    parser().run()
