"""One writer a folder: a second run there is refused, and a dead one leaves nothing in the way."""

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from vmamba.errors import UserError
from vmamba.files import cannot_write, make_folder, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows, which has msvcrt
    fcntl = None

logger = logging.getLogger("vmamba")
_FAR = 2**30  # the byte that is locked on Windows, where the locked part of a file cannot be read


class FolderLock:
    """Held by rank 0 of a run that trains.  The system lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises UserError, naming the holder, where another process holds it."""
        make_folder(self.path.parent)
        while self._file is None:
            try:
                file = self.path.open("a+", encoding="utf-8")
            except OSError as error:
                raise cannot_write(self.path, error) from error
            self._lock(file)
            with suppress(FileNotFoundError):  # else the holder has just ended, and removed the file that we opened
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    self._file = file
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        remove_leftovers(self.path.parent)

    def release(self) -> None:
        if self._file:
            with suppress(OSError):
                self.path.unlink()
            self._file.close()
            self._file = None

    def _lock(self, file: IO[str]) -> None:
        try:
            _lock_for_this_process(file)
        except (BlockingIOError, PermissionError):  # by POSIX either says that it is held, on Windows the second
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"'{self.path.parent}' is being written by {holder}; wait for its end, or choose another --tag"
            ) from None
        except OSError as error:
            logger.warning(f"'{self.path}' cannot be locked ({error.strerror}): nothing keeps a second run out")


def is_left(folder: Path) -> bool:
    """Whether a writer was in `folder` and none is any more: what lies there is of one that was killed.

    False where that cannot be told, and of an empty folder, whose writer may be about to lock it.
    """
    try:
        with (folder / ".lock").open("r+", encoding="utf-8") as file:
            _lock_for_this_process(file)
        return True
    except FileNotFoundError:  # killed while it removed what it had written, the lock first
        return folder.is_dir() and any(folder.iterdir())
    except OSError:
        return False


def _lock_for_this_process(file: IO[str]) -> None:
    """Without waiting; loading processes do not inherit it.  Raises OSError."""
    if fcntl is not None:
        return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    import msvcrt

    os.lseek(file.fileno(), _FAR, os.SEEK_SET)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
