"""Train and evaluate each of several configs with each of several seeds, and write one table of them.

python analyze/ablate.py configs/elpv/*.yaml --seeds 0 1 2 --jobs 4
"""

from vmamba.analysis.ablation import ablate
from vmamba.commands.parser import Parser, whole
from vmamba.config.keys import LARGEST_SEED


def parser() -> Parser:
    parser = Parser(ablate, __doc__, resumes=True)
    parser.flag("configs", nargs="+", metavar="CONFIG", help="files, each of one run")
    parser.flag("--seeds", type=whole(0, LARGEST_SEED), nargs="+", metavar="SEED", help="of each config")
    parser.flag("--opts", "options", nargs="+", metavar="KEY VALUE", help="set keys in all of them (default: none)")
    parser.flag("--jobs", type=whole(1), metavar="RUNS", help="runs at a time; of several GPUs each has one, in turn")
    parser.flag("--columns", nargs="+", metavar="NUMBER", help="of what --eval finds, such as macro_f1 (default: all)")
    parser.flag("--timed", action="store_true", help="time the models too, alone, in turns, after the runs")
    parser.flag("--output")
    parser.flag("--page")
    return parser
