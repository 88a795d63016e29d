"""The one exception for what a user can cause, and the sentence for an unknown name."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend.  Its text is one sentence: the value, the place, the remedy."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`: it names the nearest right one, or lists them all."""
    known = sorted(known)
    nearest = get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(each or repr(each) for each in known)}"
    return UserError(f"unknown {kind} '{name}'; {hint}")
