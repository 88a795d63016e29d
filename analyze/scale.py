"""Multiply-adds, activations and parameters against image size; with weights and a data set, accuracy too.

python analyze/scale.py --models vmamba_tiny swin_tiny_patch4_window7_224 --sizes 224 512 1024
python analyze/scale.py --models vmamba_digits --weights output/vmamba_digits/default/best.pth \\
    --cfg configs/vmamba_digits.yaml --sizes 16 24 32 48 64
"""

from _door import Parser

from vmamba.analysis.scaling import scale


def parser() -> Parser:
    parser = Parser(scale, __doc__)
    parser.flag("--models")
    parser.flag("--sizes")
    parser.flag("--weights", nargs="+", metavar="FILE", help="a checkpoint a model, in order (default: no accuracy)")
    parser.flag("--cfg", metavar="FILE", help="config whose data set gives the accuracy (default: no accuracy)")
    parser.flag("--data-path", metavar="DIR", help="where that data set is (default: as the config says)")
    parser.flag("--device")
    parser.flag("--output")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
