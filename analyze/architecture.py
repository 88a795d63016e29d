"""Draw the routes of a model's scan and what a block of it is made of.

python analyze/architecture.py --model vmamba_tiny_s1l8
"""

from _door import Parser

from vmamba.analysis.architecture import architecture


def parser() -> Parser:
    parser = Parser(architecture, __doc__)
    parser.flag("--model")
    parser.flag("--output")
    return parser


if __name__ == "__main__":
    parser().run()
