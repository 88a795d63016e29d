"""Config values as YAML and the command line give them, made the type that a key takes.

A key takes one of several kinds, a tuple of: bool, int, float, str, None, or [t] for a list of t.
"""

import ast
import math
from typing import Any

import yaml

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def from_text(text: str, kinds: tuple) -> Any:
    """What `text` of the command line means where one of `kinds` is expected."""
    if str in kinds and int not in kinds:
        return text
    if kinds == (bool,):
        return _BOOLEANS.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text


def convert(value: Any, kinds: tuple) -> Any:
    """`value` as the first of `kinds` it fits; TypeError if none."""
    for kind in kinds:
        if isinstance(kind, list):
            if isinstance(value, (list, tuple)) and all(_fits(item, kind[0]) for item in value):
                return [_cast(item, kind[0]) for item in value]
        elif _fits(value, kind):
            return _cast(value, kind)
    raise TypeError


def _fits(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    if kind is not float:
        return type(value) is kind
    try:  # YAML reads 1e-3 as a string
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _cast(value: Any, kind: type | None) -> Any:
    return None if kind is None else kind(value)


def describe(kinds: tuple) -> str:
    """`kinds` in words, for an error."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", None: "null"}
    lists = {int: "a list of integers", float: "a list of numbers", str: "a list of strings"}
    return " or ".join(lists[kind[0]] if isinstance(kind, list) else names[kind] for kind in kinds)
