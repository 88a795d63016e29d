"""What feeds a training or an evaluation, part by part, and how many loading processes it needs.

python analyze/dataloading.py --cfg configs/vmamba_tiny_s1l8.yaml --data-path data/imagenet --workers 4 8 16
"""

from _door import Parser, whole

from vmamba.analysis.dataloading import MODES, dataloading


def parser() -> Parser:
    parser = Parser(dataloading, __doc__)
    parser.flag("--cfg", metavar="FILE", help="config file of a classification")
    parser.flag("--data-path", metavar="DIR", help="its data set (default: JPEGs of ImageNet's sizes, made and kept)")
    parser.flag("--images", type=whole(1), metavar="NUMBER", help="of the JPEGs made, to train on")
    parser.flag("--workers", type=whole(0), nargs="+", metavar="NUMBER", help="numbers of loading processes")
    parser.flag("--modes", nargs="+", choices=MODES, help="what is fed")
    parser.flag("--seconds", type=whole(1), metavar="NUMBER", help="that each rate is measured for")
    parser.flag("--opts", nargs="+", metavar="KEY VALUE", help="keys over the config file's (default: none)")
    parser.flag("--device")
    parser.flag("--output")
    return parser


if __name__ == "__main__":
    parser().run()
