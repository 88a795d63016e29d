"""Loss, accuracy, learning rate and gradient norm of runs over each other.

python analyze/curves.py output/vmamba_digits/default output/vmamba_digits/other --by time
"""

from _door import Parser, whole

from vmamba.analysis.curves import curves


def parser() -> Parser:
    parser = Parser(curves, __doc__)
    parser.flag("runs", nargs="+", metavar="RUN", help="a run's folder, or a text log of Swin's kind")
    parser.flag("--by", choices=("epoch", "time"), help="what the curves run along")
    parser.flag("--smooth", type=whole(1), metavar="STEPS", help="logged steps a point of the gradient norm")
    parser.flag("--output")
    return parser


if __name__ == "__main__":
    parser().run()
