"""The program `vmamba`: vmamba train --cfg FILE, vmamba predict CHECKPOINT IMAGE ..., as the repository's doors do."""

import sys
from importlib import import_module
from typing import NoReturn

from vmamba.errors import unknown
from vmamba.runtime.__main__ import main as train

COMMANDS = {
    "train": "train, evaluate (--eval) or time (--throughput) a model",
    "predict": "what a model sees in images",
    "export": "a model as a file for other programs",
    "push": "a classifier on Hugging Face's hub",
    "ablate": "configs over seeds, and their table",
    "compare": "what runs differ in and what came out",
    "average": "the mean of checkpoints",
}


def main() -> NoReturn:
    """Of sys.argv: the command's name, and its arguments."""
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        listed = "\n".join(f"  {command:9}{meaning}" for command, meaning in COMMANDS.items())
        print(f"usage: vmamba COMMAND ...\n\n{listed}\n\nvmamba COMMAND --help lists its flags; vmamba --version")
        sys.exit(0)
    if name == "--version":
        print(f"vmamba {sys.modules['vmamba'].__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        sys.exit(f"vmamba: error: {unknown('command', name, COMMANDS)}")
    if name == "train":
        train("Train, evaluate (--eval) or time (--throughput) a model of any task.", arguments, "vmamba train")
    parser = import_module(f"vmamba.commands.{name}").parser()
    parser.prog = f"vmamba {name}"
    parser.run(arguments)
