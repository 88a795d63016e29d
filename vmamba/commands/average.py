"""The mean of several checkpoints' weights, as a checkpoint.

python analyze/average.py output/a/0/best.pth output/a/1/best.pth --output output/a/mean.pth
"""

from vmamba.analysis.averaging import average
from vmamba.commands.parser import Parser


def parser() -> Parser:
    parser = Parser(average, __doc__)
    parser.flag("checkpoints", nargs="+", metavar="CHECKPOINT", help="files of one model")
    parser.flag("--weights", choices=("auto", "ema", "model"), help="which of the checkpoints'")
    parser.flag("--output", metavar="FILE", help="the checkpoint to write")
    return parser
