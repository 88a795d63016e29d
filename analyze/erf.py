"""Effective receptive fields, before and after training: figure, table and JSON.

python analyze/erf.py --models vmamba_tiny resnet50 --size 1024 --images data/imagenet/val
python analyze/erf.py --models vmamba_digits --weights output/vmamba_digits/default/best.pth --size 32
"""

from _door import Parser, whole

from vmamba.analysis.receptive_field import erf


def parser() -> Parser:
    parser = Parser(erf, __doc__)
    parser.flag("--models")
    parser.flag(
        "--weights",
        nargs="+",
        metavar="FILE",
        help="a checkpoint a model, in order; -: random weights alone; pretrained (timm's models): downloaded "
        "(default: random weights alone)",
    )
    parser.flag("--size")
    parser.flag("--images", "images_from", metavar="DIR", help="a folder (default: scikit-learn's photographs)")
    parser.flag("--num-images", type=whole(1), metavar="NUMBER", help="images averaged over")
    parser.flag("--device")
    parser.flag("--output")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
