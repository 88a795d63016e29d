"""python -m vmamba.runtime: what main.py does, from wherever the package lies."""

import sys

from vmamba.config import argument_parser, config_from_args
from vmamba.runtime.cli import exit_code
from vmamba.runtime.trainer import run


def main(description: str | None = None) -> None:
    """Parse the command line, run, and end the process."""
    args = argument_parser(description).parse_args()
    sys.exit(exit_code(lambda: run(config_from_args(args))))


if __name__ == "__main__":
    main(__doc__)
