"""Put a classifier of a run on Hugging Face's hub, as a model of timm with its card.

python analyze/push.py output/vmamba_digits/default ME/vmamba_digits --licence mit
"""

from vmamba.commands.parser import Parser
from vmamba.exporting.publishing import push


def parser() -> Parser:
    parser = Parser(push, __doc__)
    parser.flag("checkpoint", metavar="CHECKPOINT", help="of a run, in its folder, or the folder")
    parser.flag("repo", metavar="USER/NAME", help="on the hub; made where it is not there")
    parser.flag("--licence", metavar="NAME", help="of the weights, one of the hub's names")
    parser.flag("--private", action="store_true", help="make a repository that others do not see")
    parser.flag("--weights", choices=("auto", "ema", "model"), help="which of the checkpoint's")
    parser.imports()
    return parser
