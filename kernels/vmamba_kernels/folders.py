"""Where compiled code is kept: VMAMBA_KERNELS_CACHE or ~/.cache/vmamba_kernels, if nobody else can write there."""

import os
import tempfile
from pathlib import Path

VARIABLE = "VMAMBA_KERNELS_CACHE"


class Unusable(Exception):
    """What is wrong with the folder, and the remedy."""


def folder() -> Path:
    """The folder, made if need be.  Raises Unusable where it cannot be made or trusted."""
    try:
        path = Path(os.environ.get(VARIABLE) or "~/.cache/vmamba_kernels").expanduser().absolute()
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        problem = distrust(path.stat())
    except RuntimeError:  # neither HOME nor an entry for this user in the system's list
        raise Unusable("no home folder is known to keep them in", f"set {VARIABLE} to a folder of your own") from None
    except OSError as error:
        problem = f"the cache folder {path} cannot be made ({error.strerror})"
        raise Unusable(problem, f"set {VARIABLE} to one that can") from None
    if problem:
        remedy = f"let only its owner write it (chmod go-w), or set {VARIABLE} to a folder of your own"
        raise Unusable(f"the cache folder {path} {problem}", remedy)
    return path


def own_folder(name: str) -> Path:
    """A folder that only this user reads and writes: in `folder()`, or else among the temporary files, where it stays
    as long as these do; a new one if somebody else has taken its name."""
    try:
        path = folder() / name
        path.mkdir(mode=0o700, exist_ok=True)
        if distrust(path.stat()) is None and os.access(path, os.W_OK):
            return path
    except (Unusable, OSError):
        pass
    path = Path(tempfile.gettempdir(), f"vmamba_kernels_{name}_{getattr(os, 'geteuid', int)()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        if distrust(path.lstat()) is None and os.access(path, os.W_OK) and not path.is_symlink():
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"vmamba_kernels_{name}_"))


def distrust(status: os.stat_result) -> str | None:
    """What keeps a folder or a file from being trusted, or None.  Where users have no numbers (Windows), nothing."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {status.st_uid})"
    if status.st_mode & 0o022:
        return f"can be written by others (mode {status.st_mode & 0o7777:04o})"
    return None
