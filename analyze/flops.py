"""Parameters, multiply-adds and activations, no GPU needed: table, Markdown and JSON.

python analyze/flops.py
python analyze/flops.py --models vmamba_tiny swin_tiny_patch4_window7_224 --sizes 224
"""

from _door import Parser

from vmamba.analysis.complexity import flops


def parser() -> Parser:
    parser = Parser(flops, __doc__)
    parser.flag("--models")
    parser.flag("--sizes")
    parser.flag("--output")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
