"""Files written wholly or not at all."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from vmamba.errors import UserError


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at `path` by what `write` puts into the open file it is given: wholly, or not at all.

    Raises UserError when the folder cannot be written or the disk is full; the old file is then untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two that write one file do not mix
    try:
        with beside.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        for reason in (error, error.__context__):  # torch.save hides the system's error behind one of its own
            if isinstance(reason, OSError):
                raise cannot_write(path, reason) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_atomically` of text, in UTF-8; folders are made on the way."""
    path = Path(path)
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(text.encode()))


def make_folder(path: str | Path) -> None:
    """With its parents, where it is not there yet.  Raises UserError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`; for its only writer to call."""
    for path in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def cannot_write(path: str | Path, error: OSError) -> UserError:
    return UserError(f"cannot write '{path}': {error.strerror}; free some space or choose another folder with --output")
