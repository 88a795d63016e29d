"""Checkpoints on disk: written beside the old one and renamed, read without running what they hold."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from vmamba.errors import UserError
from vmamba.models.pretrained import local_file
from vmamba.models.pretrained import read_file as read_checkpoint


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at `path` by what `write` puts into the open file it is given: wholly, or not at all.

    Raises UserError when the folder cannot be written or the disk is full; the old file is then untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
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


def cannot_write(path: str | Path, error: OSError) -> UserError:
    return UserError(f"cannot write '{path}': {error.strerror}; free some space or choose another folder with --output")


def save_checkpoint(state: Any, path: str | Path) -> None:
    """Write `state.state_dict()` to `path`.  Raises UserError where that fails, leaving the old file as it was."""
    write_atomically(path, lambda file: torch.save(state.state_dict(), file))


def read_training_state(path_or_url: str | Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote of a run of ours, None for another file.  Raises UserError for none."""
    content = read_checkpoint(local_file(path_or_url))
    return dict(content) if isinstance(content, Mapping) and "steps_per_epoch" in content else None


def newest_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that can be read, and a sentence for each newer one that cannot.

    (None, []) in a folder without checkpoints.  Raises UserError when there are some and none can be read: to start
    over beside them would overwrite what may still be saved.
    """
    skipped = []
    for path in sorted(Path(folder).glob("*.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            read_checkpoint(path)
            return path, skipped
        except UserError as error:
            skipped.append(str(error))
    if skipped:
        raise UserError(f"no checkpoint in '{folder}' can be read ({'; '.join(skipped)}); move them away to start over")
    return None, skipped
