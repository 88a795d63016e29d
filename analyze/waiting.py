"""Simulate how long many processes that step together wait for their data.

python analyze/waiting.py --needed 10 --workers 10 12 16 20 --slow 0.0001
"""

from _door import Parser, above_zero, share, whole

from vmamba.analysis.waiting import waiting


def parser() -> Parser:
    parser = Parser(waiting, __doc__)
    parser.flag("--processes", type=whole(1, 4096), nargs="+", metavar="N", help="that step together")
    parser.flag("--workers", type=whole(1), nargs="+", metavar="N", help="loading processes of each")
    parser.flag("--needed", type=whole(1), metavar="N", help="that would load as fast as a process trains")
    parser.flag("--ahead", type=whole(1), metavar="BATCHES", help="that each of them is ahead by")
    parser.flag("--spread", type=above_zero, help="of the logarithm of a batch's time")
    parser.flag("--slow", type=share, help="share of batches that take twenty times as long (default: 0.0)")
    parser.flag("--steps", type=whole(2), help="to simulate")
    parser.flag("--output")
    return parser


if __name__ == "__main__":
    parser().run()
