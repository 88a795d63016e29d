"""The published accuracies against multiply-adds, and against the speeds in docs/ that were measured here.

python analyze/tradeoff.py --mode train
"""

from _door import Parser

from vmamba.analysis.speed import MODES
from vmamba.analysis.tradeoff import tradeoff


def parser() -> Parser:
    parser = Parser(tradeoff, __doc__)
    parser.flag("--docs", metavar="DIR", help="folder with the pages of measured speeds")
    parser.flag("--mode", choices=MODES, help="whose speeds")
    parser.flag("--output")
    return parser


if __name__ == "__main__":
    parser().run()
