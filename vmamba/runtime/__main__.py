"""python -m vmamba.runtime: what main.py does, from wherever the package lies."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from vmamba.config import argument_parser, config_from_args
from vmamba.runtime.cli import exit_code
from vmamba.runtime.trainer import run


def main(description: str | None = None, arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, or `arguments`, run, and end the process."""
    parser = argument_parser(description)
    parser.prog = prog or parser.prog
    args = parser.parse_args(arguments)
    sys.exit(exit_code(lambda: run(config_from_args(args)), resumes=True))


if __name__ == "__main__":
    main(__doc__)
