"""Measure what saving costs a training: blocking, and in the background as runs save.

python analyze/saving.py --model vmamba_base --batch 64 --folder output
"""

from _door import Parser, whole

from vmamba.analysis.saving_speed import saving_speed


def parser() -> Parser:
    parser = Parser(saving_speed, __doc__)
    parser.flag("--model")
    parser.flag("--size")
    parser.flag("--batch", type=whole(1), metavar="IMAGES", help="images a step")
    parser.flag("--repeats", type=whole(1), metavar="SAVES", help="saves of each kind of which the median counts")
    parser.flag("--folder", metavar="DIR", help="where is saved to (default: a folder for temporary files)")
    parser.flag("--device")
    parser.flag("--output")
    return parser


if __name__ == "__main__":
    parser().run()
