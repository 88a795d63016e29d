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

from ..folders import VARIABLE, Unusable, distrust, folder


def read(name: str) -> bytes | None:
    """The entry `name`, or None."""
    place = _folder()
    if place is None:
        return None
    try:
        with (place / name).open("rb") as file:
            problem = distrust(os.fstat(file.fileno()))
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        _warn(
            f"an entry of the cache folder {place} {problem}", "remove such files, or let only their owner write them"
        )
        return None
    return data[:-32] if _digest(name, data[:-32]) == data[-32:] else None


def write(name: str, data: bytes) -> None:
    """Keep `data` as the entry `name`, readable by others as far as the umask lets them."""
    place = _folder()
    if place is None:
        return
    beside = place / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(data + _digest(name, data))
        beside.replace(place / name)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if not isinstance(error, OSError):
            raise
        _warn(f"the cache folder {place} cannot be written ({error.strerror})", f"set {VARIABLE} to one that can")


def _folder() -> Path | None:
    """The cache's folder, made if need be; None if there is none, or none to be trusted."""
    try:
        return folder()
    except Unusable as problem:
        _warn(*problem.args)
        return None


def _digest(name: str, data: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + data).digest()


@cache  # once for each problem
def _warn(problem: str, remedy: str) -> None:
    warnings.warn(f"kernels are compiled again by every process: {problem}; {remedy}", stacklevel=5)
