"""A copy of a folder of images with the large ones made smaller, so that they are read and decoded sooner.

python analyze/shrink.py /data/imagenet --output /data/imagenet320
"""

from _door import Parser, whole

from vmamba.analysis.shrinking import shrink


def parser() -> Parser:
    parser = Parser(shrink, __doc__, resumes=True)
    parser.flag("folder", metavar="FOLDER", help="the images, in folders of any depth")
    parser.flag("--output", metavar="FOLDER", help="for the copy; what is whole there is kept")
    parser.flag("--short-side", "side", type=whole(1), metavar="PIXELS", help="of what is larger, afterwards")
    parser.flag("--quality", type=whole(1, 100), help="of the JPEGs that are made")
    parser.flag("--workers", type=whole(1), metavar="THREADS", help="that share the work (default: one a core)")
    return parser


if __name__ == "__main__":
    parser().run()
