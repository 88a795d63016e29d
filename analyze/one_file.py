"""Make one file of the checkpoint that a run with TRAIN.PARALLEL fsdp saved as a folder.

python analyze/one_file.py output/vmamba_base/default/last.sharded --output last.pth
"""

from _door import Parser

from vmamba.runtime.shares import one_file


def parser() -> Parser:
    parser = Parser(one_file, __doc__)
    parser.flag("folder", metavar="FOLDER", help="last.sharded, best.sharded, ...")
    parser.flag("--output", metavar="FILE", help="the checkpoint to write")
    return parser


if __name__ == "__main__":
    parser().run()
