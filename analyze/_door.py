"""Imported first by the doors of this folder: it puts this repository in front of whatever else is called vmamba."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmamba.commands.parser import Parser, above_zero, or_word, place, share, side, whole

__all__ = ["Parser", "above_zero", "command", "or_word", "place", "share", "side", "whole"]


def command(name: str) -> Callable[[], Parser]:
    """The parser of a command of the program `vmamba`."""
    return import_module(f"vmamba.commands.{name}").parser
