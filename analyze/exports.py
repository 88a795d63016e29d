"""Exported models beside PyTorch's: the same numbers in onnxruntime, and how long it takes.

python analyze/exports.py --models swin_tiny_patch4_window7_224 vmamba_tiny_s1l8 --sizes 224
"""

from _door import Parser, whole

from vmamba.exporting.comparison import NUMBERS, exports


def parser() -> Parser:
    parser = Parser(exports, __doc__)
    parser.flag("--models")
    parser.flag("--sizes")
    parser.flag("--numbers", nargs="+", choices=NUMBERS, help="of the ONNX file")
    parser.flag("--relative-to", metavar="MODEL", help="the model that ratios are given to (default: the first)")
    parser.flag("--no-pytorch", "pytorch", action="store_false", help="time onnxruntime alone (default: both)")
    parser.flag("--warm-up", type=whole(1), metavar="STEPS", help="steps before the timed ones")
    parser.flag("--repeats", type=whole(0), metavar="STEPS", help="timed steps; 0: compare numbers alone")
    parser.flag("--output")
    parser.flag("--markdown", metavar="FILE", help="write the table there too (default: only into the folder)")
    return parser


if __name__ == "__main__":
    parser().run()
