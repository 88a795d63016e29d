"""Write a model as a file for other programs: python export.py --checkpoint best.pth --output model.onnx

Bare weights (.safetensors, .pth), programs of torch.export (.pt2), ONNX (.onnx): docs/export.md.
"""

from vmamba.commands.parser import Parser
from vmamba.exporting import DYNAMIC, SPELLINGS, SUFFIXES
from vmamba.exporting.command import PARTS, export_file


def parser() -> Parser:
    parser = Parser(export_file, __doc__)
    parser.flag("--model", help="of ours or timm's, with random weights (default: that of --checkpoint)")
    parser.flag("--checkpoint", metavar="FILE", help="of a run, or its folder, or a released file or its address")
    parser.flag("--cfg", metavar="FILE", help="config of a checkpoint that does not hold its own")
    parser.flag("--names", metavar="FILE", help="the classes' names, one a line")
    parser.flag("--weights", choices=("auto", "ema", "model"), help="which of the checkpoint's")
    parser.flag("--part", choices=PARTS, help="of a detector or segmenter")
    parser.flag("--format", choices=SUFFIXES, help="(default: as the suffix of --output says)")
    parser.flag("--size", help="side of the image (default: the run's, or 224)")
    parser.flag("--dynamic", nargs="*", choices=DYNAMIC, help="what of the images stays open")
    parser.flag("--spelling", choices=SPELLINGS, help="of the names of weights")
    parser.flag("--output", metavar="FILE", help="the file to be written")
    parser.flag("--card", action="store_true", help="write README.md beside it, the run's card in the hub's form")
    parser.flag("--licence", metavar="NAME", help="of the weights, for the card")
    parser.imports()
    return parser
