"""Words in sentences: other people's names, lists, numbers of things."""

from collections.abc import Sequence
from typing import Any


def printable(name: Any) -> str:
    """`name` in one line that any UTF-8 stream takes.

    A file's name may hold line breaks, and bytes that are no text (surrogates in Python): printing them is an error.
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def some(names: Sequence[Any]) -> str:
    """The first five of `names`, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "nothing"


def counted(number: int, noun: str, nouns: str = "") -> str:
    """ "1 class", "1,000 classes"; `nouns` is the plural where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"
