"""What the configs of runs differ in and what came out, side by side; repetitions over seeds as mean and deviation.

python analyze/compare.py output/vmamba_digits/*
"""

from vmamba.analysis.comparison import compare
from vmamba.commands.parser import Parser


def parser() -> Parser:
    parser = Parser(compare, __doc__)
    parser.flag("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.flag("--output")
    return parser
