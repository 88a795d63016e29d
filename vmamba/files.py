"""Files written wholly or not at all, and by one process at a time."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vmamba.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, which has msvcrt
    fcntl = None


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


@contextmanager
def held(path: str | Path) -> Iterator[None]:
    """Hold `path`, a file that is made for it, against all other processes that do the same; waits for its turn.

    A process that ends, in whatever way, holds nothing any more.  Raises OSError where the file cannot be made.
    """
    path = Path(path)
    while True:
        file = path.open("ab")
        _lock(file)
        if _lies_at(path, file):
            break
        file.close()  # who held it before has removed it
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file; then it stays
            path.unlink()
        file.close()


def _lies_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _lock(file: IO[bytes]) -> None:
    if fcntl is not None:
        return fcntl.flock(file, fcntl.LOCK_EX)
    import msvcrt

    while True:
        with suppress(OSError):  # after ten seconds of waiting
            return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`; for its only writer to call."""
    for path in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def cannot_write(path: str | Path, error: OSError) -> UserError:
    return UserError(f"cannot write '{path}': {error.strerror}; free some space or choose another folder with --output")
