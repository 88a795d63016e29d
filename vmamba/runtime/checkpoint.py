"""Checkpoints on disk: written beside the old one and renamed, read without running what they hold."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vmamba.errors import UserError
from vmamba.files import write_atomically
from vmamba.models.pretrained import local_file
from vmamba.models.pretrained import read_file as read_checkpoint

LAST, BEST = "last.pth", "best.pth"  # what a run writes


def save_checkpoint(state: Any, path: str | Path) -> None:
    """Write `state.state_dict()` to `path`.  Raises UserError where that fails, leaving the old file as it was."""
    write_atomically(path, lambda file: torch.save(state.state_dict(), file))


def read_training_state(path_or_url: str | Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote of a run of ours, None for another file.  Raises UserError for none."""
    content = read_checkpoint(local_file(path_or_url))
    return dict(content) if is_training_state(content) else None


def is_training_state(content: Any) -> bool:
    return isinstance(content, Mapping) and "steps_per_epoch" in content and _position(content) is not None


def newest_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The state of a run in `folder` that is the furthest, and a sentence for each file passed over.

    Those are `last.pth` and `best.pth`; other files are other people's.  How far a state is stands inside it: copying
    and touching files changes nothing.  (None, [...]) in a folder without one.  Raises UserError where a run would
    overwrite what is no state, or what cannot be read and may still be saved.
    """
    states, passed_over = [], []
    for name in (LAST, BEST):
        path = Path(folder, name)
        if not os.path.lexists(path):
            continue
        try:
            content = _peek(path)
        except UserError as error:
            passed_over.append(str(error))
            continue
        if not is_training_state(content):
            raise UserError(
                f"'{path}' is not the state of a run and would be overwritten; move it away, or choose another --tag"
            )
        states.append((_position(content), name == LAST, path))
    if states:
        return max(states)[-1], passed_over
    if passed_over:
        raise UserError(
            f"no checkpoint in '{folder}' can be read ({'; '.join(passed_over)}); move them away to start over"
        )
    return None, passed_over


def is_there(path: Path) -> bool:
    """Whether the state of a run at `path` can be read."""
    try:
        return path.exists() and is_training_state(_peek(path))
    except UserError:
        return False


def _position(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """(step, step of the last record) of a state, an evaluated one being further than the same before its evaluation;
    None where they are no numbers."""
    steps_per_epoch, epoch = content["steps_per_epoch"], content.get("epoch", 0)
    if not isinstance(steps_per_epoch, int) or not isinstance(epoch, int):
        return None
    found = content.get("step", 0), content.get("recorded", epoch * steps_per_epoch)
    return found if all(isinstance(number, int) for number in found) else None


def _peek(path: Path) -> Any:
    """What the file holds, tensors left on the disk.  Raises UserError where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # another kind of file, or a damaged one: it is read whole, which says which
        return read_checkpoint(path)
