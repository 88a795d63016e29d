"""The scan as attention: which pixels reach a query pixel along each route, over the image; and C . B alone.

python analyze/activation_map.py photo.jpg --model vmamba_tiny --weights vmamba_tiny.pth --layer 2.8 --at 0.5,0.3
"""

from _door import Parser, or_word, place, whole

from vmamba.analysis.attention import activation_map


def parser() -> Parser:
    parser = Parser(activation_map, __doc__)
    parser.flag("image", nargs="?", metavar="IMAGE", help="a file (default: scikit-learn's photograph of a flower)")
    parser.flag("--model")
    parser.flag("--weights", metavar="FILE", help="a checkpoint (default: random weights)")
    parser.flag("--size")
    parser.flag("--layer", help="stage.block, counted from zero")
    parser.flag("--at", type=place, metavar="X,Y", help="the query, shares of the sides")
    parser.flag(
        "--channels",
        nargs="+",
        type=or_word("mean", whole(0)),
        metavar="CHANNEL",
        help="numbers counted from zero, or mean, of all (default: mean)",
    )
    parser.flag("--matrix", action="store_true", help="also write the weights of all queries")
    parser.flag("--device")
    parser.flag("--output")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
