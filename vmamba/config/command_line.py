"""Swin's flags, made from the keys that have one."""

import argparse
import sys
from collections.abc import Collection
from typing import NoReturn

from yacs.config import CfgNode

from vmamba.config.files import from_text
from vmamba.config.keys import TASKS, Key, keys_of
from vmamba.config.merge import merge, pairs
from vmamba.errors import nearest


def argument_parser(description: str | None = None, without: Collection[str] = ()) -> argparse.ArgumentParser:
    """The flags of every task, but for those `without` which a door has one of its own.  Underscores serve as hyphens;
    a switch takes true, false or nothing.

    What is wrong on the command line ends the program with one sentence and status 2.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", help="config file (required)")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar=("KEY", "VALUE"), help="set any key of docs/config.md"
    )
    for key in (each for flag, each in _flags().items() if flag not in without):
        text = key.meaning + (f"; one of {key.takes}" if key.takes.choices else "")
        text += "" if key.default in ("", None) else f" (default: {_shown(key.default)})"
        if key.takes.kinds == (bool,):
            _add_switch(parser, key.flag, text)
        else:
            parser.add_argument(f"--{key.flag}", metavar=key.name.rpartition(".")[2], help=text.replace("%", "%%"))
    _add_switch(parser, "disable-amp", "compute in float32")
    parser.add_argument("--amp-opt-level", choices=["O0", "O1"], help="apex's names: O0 is --disable-amp, O1 autocast")
    parser.add_argument("--local-rank", type=int, help="passed by torch.distributed.launch; LOCAL_RANK is what counts")
    return parser


def config_from_args(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line parsed by `argument_parser`: file, then --opts, then the other flags."""
    settings = pairs(args.opts)
    for flag, key in _flags().items():
        value = getattr(args, flag.replace("-", "_"), None)
        if value is not None:
            settings.append((key.name, value, f"--{flag}"))
    if args.amp_opt_level is not None:
        settings.append(("AMP.ENABLE", args.amp_opt_level != "O0", "--amp-opt-level"))
    if args.disable_amp is not None:
        disable = from_text(args.disable_amp, (bool,))
        settings.append(("AMP.ENABLE", disable if isinstance(disable, str) else not disable, "--disable-amp"))
    return merge(args.cfg, settings)


def _flags() -> dict[str, Key]:
    return {key.flag: key for task in TASKS for key in keys_of(task).values() if key.flag}


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _add_switch(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(f"--{flag}", nargs="?", const="true", metavar="true|false", help=text)


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):
        args = [self._hyphenated(arg) for arg in (sys.argv[1:] if args is None else args)]
        parsed, extra = self.parse_known_args(args, namespace)
        flag = next((arg.partition("=")[0] for arg in extra if arg.startswith("-")), None)
        if flag is not None:
            names = [name.lstrip("-") for name in self._option_string_actions]
            near = nearest(flag.lstrip("-"), names)
            self.error(f"unknown flag '{flag}'; " + (f"did you mean '--{near}'?" if near else "--help lists them"))
        if extra:
            self.error(f"unexpected argument '{extra[0]}'; every argument belongs to a flag")
        if parsed.cfg is None:
            self.error("--cfg FILE is required, for instance --cfg configs/vmamba_digits.yaml")
        return parsed

    def _hyphenated(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        hyphenated = flag.replace("_", "-")
        return hyphenated + equals + value if hyphenated in self._option_string_actions else arg

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
