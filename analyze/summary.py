"""The modules of a model with parameters and shapes, and its stages with their multiply-adds.

python analyze/summary.py vmamba_tiny --size 224 --depth 4
"""

from _door import Parser, whole

from vmamba.analysis.summary import summary


def parser() -> Parser:
    parser = Parser(summary, __doc__)
    parser.flag("model", nargs="?", metavar="MODEL", help="of vmamba.list_models() or timm's")
    parser.flag("--weights", metavar="FILE", help="a checkpoint whose model it is (default: random weights)")
    parser.flag("--size")
    parser.flag("--depth", type=whole(1), metavar="NAMES", help="names in a module's path")
    parser.flag("--output", metavar="FILE", help="write it there too (default: only print it)")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
