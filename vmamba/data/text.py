"""Other people's names and texts: how a name is told in a sentence, and text in the encodings it comes in."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmamba.errors import UserError

_MARKS = {  # a text that begins with one says its encoding; UTF-16's is the beginning of UTF-32's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def printable(name: Any) -> str:
    """`name` in one line that any UTF-8 stream takes.

    A file's name may hold line breaks, and bytes that are no text (surrogates in Python): printing them is an error.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(name))


def some(names: Sequence[Any]) -> str:
    """The first five of `names`, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "nothing"


def cannot_read(path: str | Path, error: OSError) -> UserError:
    """The sentence for what the system said of `path`."""
    remedy = "make it readable" if isinstance(error, PermissionError) else "check that it is there and whole"
    return UserError(f"cannot read '{printable(path)}': {error.strerror or printable(error)}; {remedy}")


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says (Windows writes UTF-16).

    Raises UserError where it cannot be read or is in another encoding.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_text(path, f"byte {error.start} does not fit {encoding}") from error
    if "\0" in text:  # UTF-16 without its mark passes for UTF-8
        raise _not_text(path, f"byte {data.index(0)} is zero")
    return text


def _not_text(path: str | Path, why: str) -> UserError:
    return UserError(f"'{printable(path)}' is no text in UTF-8, or UTF-16 with its mark: {why}; save it in UTF-8")
