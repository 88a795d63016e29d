"""Compiled kernels (cubins) on disk, so that a process compiles only what none before it has.

The folder is VMAMBA_KERNELS_CACHE, or else ~/.cache/vmamba_kernels.  What lies there runs on the GPU as this user's, so
it is trusted only where nobody but this user or root can have put it: folder and entries are theirs and nobody else
may write them.  Users share a cache that root fills.  Whatever is wrong with a cache is told once, and the kernels are
compiled without it.

An entry appears by a rename, and its last 32 bytes are the hash of its name and the rest: several processes may start
at once, and what is damaged, or was another entry, is as if it were not there.
"""

import hashlib
import os
import secrets
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

VARIABLE = "VMAMBA_KERNELS_CACHE"


def read(name: str) -> bytes | None:
    """The entry `name`, or None."""
    folder = _folder()
    if folder is None:
        return None
    try:
        with (folder / name).open("rb") as file:
            problem = _distrust(os.fstat(file.fileno()))
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        _warn(
            f"an entry of the cache folder {folder} {problem}", "remove such files, or let only their owner write them"
        )
        return None
    return data[:-32] if _digest(name, data[:-32]) == data[-32:] else None


def write(name: str, data: bytes) -> None:
    """Keep `data` as the entry `name`, readable by others as far as the umask lets them."""
    folder = _folder()
    if folder is None:
        return
    beside = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(data + _digest(name, data))
        beside.replace(folder / name)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if not isinstance(error, OSError):
            raise
        _warn(f"the cache folder {folder} cannot be written ({error.strerror})", f"set {VARIABLE} to one that can")


def _folder() -> Path | None:
    """The cache's folder, made if need be; None if there is none, or none to be trusted."""
    try:
        folder = Path(os.environ.get(VARIABLE) or "~/.cache/vmamba_kernels").expanduser().absolute()
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        problem = _distrust(folder.stat())
    except RuntimeError:  # neither HOME nor an entry for this user in the system's list
        _warn("no home folder is known to keep them in", f"set {VARIABLE} to a folder of your own")
        return None
    except OSError as error:
        _warn(f"the cache folder {folder} cannot be made ({error.strerror})", f"set {VARIABLE} to one that can")
        return None
    if problem:
        remedy = f"let only its owner write it (chmod go-w), or set {VARIABLE} to a folder of your own"
        _warn(f"the cache folder {folder} {problem}", remedy)
        return None
    return folder


def _distrust(status: os.stat_result) -> str | None:
    """What keeps a folder or a file from being trusted, or None.  Where users have no numbers (Windows), nothing."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {status.st_uid})"
    if status.st_mode & 0o022:
        return f"can be written by others (mode {status.st_mode & 0o7777:04o})"
    return None


def _digest(name: str, data: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + data).digest()


@cache  # once for each problem
def _warn(problem: str, remedy: str) -> None:
    warnings.warn(f"kernels are compiled again by every process: {problem}; {remedy}", stacklevel=5)
