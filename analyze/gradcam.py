"""Grad-CAM: where the image speaks for a class, at the output of chosen blocks.  Needs pip install -e '.[analysis]'.

python analyze/gradcam.py photo.jpg --model vmamba_tiny --weights vmamba_tiny.pth --layers 2.8 3.1
"""

from _door import Parser, whole

from vmamba.analysis.gradcam import gradcam


def parser() -> Parser:
    parser = Parser(gradcam, __doc__)
    parser.flag("image", nargs="?", metavar="IMAGE", help="a file (default: scikit-learn's photograph of a flower)")
    parser.flag("--model")
    parser.flag("--weights", metavar="FILE", help="a checkpoint (default: random weights)")
    parser.flag("--size")
    parser.flag("--layers", nargs="+", metavar="LAYER", help="stage.block, counted from zero")
    parser.flag("--target", type=whole(0), metavar="CLASS", help="a class's number (default: the class predicted)")
    parser.flag("--device")
    parser.flag("--output")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
