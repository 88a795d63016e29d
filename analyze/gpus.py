"""Time training on several GPUs of a machine, by DDP and FSDP2, beside one.

python analyze/gpus.py --models vmamba_tiny_s1l8 vmamba_base_s1l20 --gpus 1 2 4 --ways ddp ddp:cudagraphs fsdp
"""

from _door import Parser, whole

from vmamba.analysis.parallel_speed import WAYS, parallel_speed


def parser() -> Parser:
    parser = Parser(parallel_speed, __doc__)
    parser.flag("--models")
    parser.flag("--gpus", "counts", type=whole(1), nargs="+", metavar="NUMBER", help="numbers of processes")
    parser.flag("--ways", nargs="+", choices=WAYS, help="TRAIN.PARALLEL, and TRAIN.COMPILE behind a colon")
    parser.flag("--size")
    parser.flag("--batch", type=whole(1), metavar="IMAGES", help="of a process")
    parser.flag("--steps", type=whole(1), help="of a round; the median of three rounds counts")
    parser.flag("--device")
    parser.flag("--output")
    parser.flag("--page")
    return parser


if __name__ == "__main__":
    parser().run()
