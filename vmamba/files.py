"""Files written wholly or not at all, or held by one process at a time; text in the encodings it comes in."""

import codecs
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vmamba.errors import UserError
from vmamba.text import printable

_MARKS = {  # a text that begins with one says its encoding; UTF-16's is the beginning of UTF-32's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_LONGEST = 200  # bytes of a name that a few are added to; file systems take 255
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # what `write_atomically` writes until it is whole

try:
    import fcntl
except ImportError:  # Windows, which has msvcrt
    fcntl = None


def write_atomically(
    path: str | Path, write: Callable[[IO[bytes]], object], publish: Callable[[Path], object] = lambda written: None
) -> None:
    """Replace the file at `path` by what `write` puts into the open file it is given: wholly, or not at all.

    `publish` is called with the file once it is whole, before it takes its place.
    Raises UserError when the folder cannot be written or the disk is full; the old file is then untouched.
    """
    path = Path(path)
    beside = _beside(path)
    try:
        with beside.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        publish(beside)
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        for reason in (error, error.__context__):  # torch.save hides the system's error behind one of its own
            if isinstance(reason, OSError):
                raise cannot_write(path, reason) from error
        raise


def _beside(path: Path) -> Path:
    """Another name in the same folder; two that write one file do not mix."""
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    return path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")


def copy_atomically(file: Path, path: Path) -> None:
    """Replace the file at `path` by a copy of `file`.  Raises UserError as `write_atomically`."""
    with file.open("rb") as source:
        write_atomically(path, lambda target: shutil.copyfileobj(source, target, 2**24))


def link_atomically(file: Path, path: Path) -> None:
    """Let `path` lead to `file` itself, in the place of what it led to; to a copy where there are no links (exFAT)."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(file, beside)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        copy_atomically(file, path)


def write_text(path: str | Path, text: str) -> None:
    """`write_atomically` of text, in UTF-8; folders are made on the way."""
    path = Path(path)
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(text.encode()))


def check_writable(*paths: str | Path) -> None:
    """That files can be written at `paths`, before hours go into what they will hold; their folders are made.

    Raises UserError as writing them would.
    """
    for path in map(Path, paths):
        make_folder(path.parent)
        if _is_folder(path):
            raise cannot_write(path, IsADirectoryError(errno.EISDIR, "it is a folder"))
        beside = _beside(path)
        try:
            beside.touch(exist_ok=False)  # what the system says of permissions is not all: /proc takes no files
            beside.unlink()
        except OSError as error:
            raise cannot_write(path, error) from error


def _is_folder(path: Path) -> bool:
    """Raises UserError for a name that no file can have."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:  # Python's ValueError is of a zero byte
        raise cannot_write(path, error) from error


def check_keeps(inputs: Iterable[str | Path], *paths: str | Path) -> None:
    """That nothing written at `paths` takes the place of a file that is read, under whatever name or link.

    Raises UserError where it would.
    """
    read = {found: path for path in inputs if (found := _identity(path)) is not None}
    for path in paths:
        if (found := _identity(path)) in read:
            raise UserError(
                f"'{printable(path)}' would be written over '{printable(read[found])}', which is read here; choose "
                f"another --output"
            )


def check_replaces(path: str | Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """That a file at `path` is one of those that are written there, a `what`, or has nothing in it.

    `is_ours` says so of a file, and may raise anything of another one.  Raises UserError for that.
    """
    path = Path(path)
    try:
        if not path.exists() or not path.stat().st_size or is_ours(path):
            return
    except Exception:  # of what is another kind of file, by whoever reads it
        pass
    raise UserError(f"'{printable(path)}' is there already and is no {what}; remove it, or choose another file")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Of the file that a path leads to; None where none is."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a zero byte in it, for one
        return None
    return found.st_dev, found.st_ino


def make_folder(path: str | Path) -> None:
    """With its parents, where it is not there yet.  Raises UserError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
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
    for path in Path(folder).iterdir():
        if _LEFTOVER.fullmatch(path.name):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says (Windows writes UTF-16).

    Raises UserError where it cannot be read or is in another encoding.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise cannot_read(path, error) from error
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_text(path, f"byte {error.start} does not fit {encoding}") from error
    if "\0" in text:  # UTF-16 without its mark passes for UTF-8
        raise _not_text(path, f"byte {data.index(0)} is zero")
    return text


def cannot_read(path: str | Path, error: OSError | ValueError) -> UserError:
    """The sentence for what the system said of `path`; a ValueError is Python's, of a zero byte in it."""
    remedy = "make it readable" if isinstance(error, PermissionError) else "check that it is there and whole"
    reason = getattr(error, "strerror", None) or printable(error)
    return UserError(f"cannot read '{printable(path)}': {reason}; {remedy}")


def cannot_write(path: str | Path, error: OSError | ValueError) -> UserError:
    """Likewise."""
    if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
        remedy = "choose another name"
    elif error.errno == errno.EISDIR:
        remedy = "name a file in it"
    else:
        remedy = "free some space or choose another folder"
    return UserError(f"cannot write '{printable(path)}': {getattr(error, 'strerror', error)}; {remedy}")


def _not_text(path: str | Path, why: str) -> UserError:
    return UserError(f"'{printable(path)}' is no text in UTF-8, or UTF-16 with its mark: {why}; save it in UTF-8")
