"""The one exception for what a user can cause, and the sentence for an unknown name."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_MOST_LISTED = 30


class UserError(ValueError):
    """Something the user can mend.  Its text is one sentence: the value, the place, the remedy."""


def unknown(kind: str, name: Any, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`: it names the nearest right one, or lists them."""
    known = sorted(known)
    near = nearest(name, known) if isinstance(name, str) else None
    listed = ", ".join(each or repr(each) for each in known[:_MOST_LISTED])
    more = f" and {len(known) - _MOST_LISTED} more" if len(known) > _MOST_LISTED else ""
    shown = f"'{name:.200}'" if isinstance(name, str) else f"{name!r:.60}"
    return UserError(f"unknown {kind} {shown}; " + (f"did you mean '{near}'?" if near else f"known: {listed}{more}"))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is likely a misspelling of."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=0.6)), None)
