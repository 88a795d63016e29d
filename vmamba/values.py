"""What a named setting takes, a config's key or a model's option alike: kinds of values, and bounds on them.

A setting takes one of several kinds, a tuple of: bool, int, float, str, None, or [t] for a list of t.
"""

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vmamba.errors import UserError, unknown


@dataclass(frozen=True)
class Takes:
    """The values a setting takes.  Bounds and choices hold for each item of a list."""

    kinds: tuple
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Callable[[], Iterable[str]] | tuple[str, ...] | None = None  # of strings; a function where they may grow
    length: int | None = None  # of a list
    rising: bool = False  # a list's values do not fall

    def check(self, name: str, value: Any) -> Any:
        """`value` as the first of `kinds` it fits.  Raises UserError, naming `name` and what it takes."""
        try:
            value = _convert(value, self.kinds)
        except TypeError:
            kind, expected = type(value).__name__, _describe(self.kinds)
            if any(map(_is_endless, value if isinstance(value, (list, tuple)) else [value])):
                expected = expected.replace("number", "finite number")
            raise UserError(f"{name} is {value!r:.200} ({kind}); expected {expected}") from None
        items = value if isinstance(value, list) else [value]
        if self.length is not None and isinstance(value, list) and len(value) != self.length:
            raise UserError(f"{name} is {value!s:.200}; expected {self.length} values")
        for item in items:
            self._check_item(name, value, item)
        if self.rising and items != sorted(items):
            raise UserError(f"{name} is {value!s:.200}; expected the smaller first")
        return value

    def _check_item(self, name: str, value: Any, item: Any) -> None:
        if isinstance(item, str) and self.choices is not None:
            choices = self.choices() if callable(self.choices) else self.choices
            if item not in choices and int in self.kinds and item.isdigit():
                raise UserError(f"{name} is {item!r} (str); expected an integer, so write it without quotes")
            if item not in choices:
                raise unknown(name, item, choices)
        if isinstance(item, (int, float)) and not isinstance(item, bool) and not self._in_bounds(item):
            raise UserError(f"{name} is {value!s:.200}; it must be {self.bounds()}")

    def _in_bounds(self, number: float) -> bool:
        return not (
            (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )

    def bounds(self) -> str:
        """In words; "" where there are none."""
        if (self.at_least, self.at_most) != (None, None) and None not in (self.at_least, self.at_most):
            return f"between {self.at_least} and {self.at_most}"
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)

    def __str__(self) -> str:
        """In words, for a table of settings."""
        if self.choices is not None and not callable(self.choices):
            others = tuple(kind for kind in self.kinds if kind not in (str, [str]))
            words = [choice or "''" for choice in self.choices]
            return ", ".join([*words, f"{_describe(others)} {self.bounds()}".strip()] if others else words)
        order = ", the smaller first" if self.rising else ""
        return " ".join(filter(None, [_describe(self.kinds), self.bounds()])) + order


def kinds_of(default: Any) -> tuple:
    """What a setting takes whose `default` says it: its type, for a list that of its first item."""
    return ([type(default[0])],) if isinstance(default, (list, tuple)) else (type(default),)


def _convert(value: Any, kinds: tuple) -> Any:
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
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, (bool, np.bool_)) or kind is bool:
        return kind is bool and isinstance(value, (bool, np.bool_))
    if kind is int:
        return isinstance(value, numbers.Integral)
    try:  # YAML reads 1e-3 as a string
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_endless(value: Any) -> bool:
    """Whether it is a number, but NaN or infinite."""
    return isinstance(value, numbers.Real) and not math.isfinite(value)


def _cast(value: Any, kind: type | None) -> Any:
    return None if kind is None else kind(value)


def _describe(kinds: tuple) -> str:
    """`kinds` in words."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", None: "null"}
    lists = {int: "a list of integers", float: "a list of numbers", str: "a list of strings"}
    return " or ".join(lists[kind[0]] if isinstance(kind, list) else names[kind] for kind in kinds)
