"""Checkpoints on disk: written beside the old one and renamed, read without running what they hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vmamba.errors import UserError
from vmamba.files import write_atomically
from vmamba.models.pretrained import local_file
from vmamba.models.pretrained import read_file as read_checkpoint


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
