"""Show what a model sees in images: python predict.py CHECKPOINT IMAGE ... (files, folders, patterns).

Classes, boxes and masks, or a map of classes, by the checkpoint's task: a picture of each, and predictions.json.
"""

from vmamba.analysis.prediction import predict
from vmamba.commands.parser import Parser, share


def parser() -> Parser:
    parser = Parser(predict, __doc__)
    parser.flag("checkpoint", metavar="CHECKPOINT", help="of a run, or a released file or its address")
    parser.flag("images", nargs="+", metavar="IMAGE", help="files, folders, patterns")
    parser.flag("--cfg", metavar="FILE", help="config of a checkpoint that does not hold its own")
    parser.flag("--names", metavar="FILE", help="the classes' names, one a line")
    parser.flag("--score", type=share, help="least score of a detection in the pictures")
    parser.flag("--weights", choices=("auto", "ema", "model"), help="which of the checkpoint's")
    parser.flag("--device")
    parser.flag("--output")
    parser.imports()
    return parser
