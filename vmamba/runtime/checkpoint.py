"""Checkpoints on disk: written beside the old one and renamed, read without running what they hold."""

import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vmamba.errors import UserError
from vmamba.files import cannot_read, link_atomically, write_atomically
from vmamba.models.formats import PLAIN
from vmamba.models.pretrained import local_file
from vmamba.models.pretrained import read_file as read_checkpoint

LAST, BEST = "last.pth", "best.pth"  # what a run writes; the states before, and the second best, as last.2.pth, ...
SHARDED = ".sharded"  # in the place of .pth: a folder, written by all processes (`shares`)
SUMS = "sums"  # in PLAIN: of the folder's other files
_WRITTEN = re.compile(r"(last|best)(\.[2-9]|\.[1-9]\d+)?(\.pth|\.sharded)")


def save_checkpoint(
    content: Mapping[str, Any], path: str | Path, publish: Callable[[Path], object] = lambda written: None
) -> None:
    """Write `content` to `path`; `publish` as of `write_atomically`.  Raises UserError where that fails, the old file
    being untouched."""
    write_atomically(path, lambda file: torch.save(content, file), publish)


def read_training_state(path_or_url: str | Path) -> dict[str, Any] | None:
    """The state that a run of ours has saved as a file, None for another file.  Raises UserError for none."""
    content = read_checkpoint(local_file(path_or_url))
    return dict(content) if is_training_state(content) else None


def is_training_state(content: Any) -> bool:
    return isinstance(content, Mapping) and "steps_per_epoch" in content and _position(content) is not None


def nth(path: Path, number: int) -> Path:
    """The name of the `number`-th of several: last.pth, last.2.pth, ..."""
    return path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def make_room(path: Path, number: int, count: int) -> None:
    """Move the `number`-th of `count` kept files on, and those behind it; the last goes.  A first one stays as well."""
    for place in range(count, number, -1):
        before = nth(path, place - 1)
        if before.exists():
            (link_atomically if place == 2 else os.replace)(before, nth(path, place))


def newest_checkpoint(folder: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The state of a run in `folder` that is the furthest of those that are whole, and by path why others were passed
    over.

    A run's are `last.pth` and `best.pth` and the numbered ones; other files are other people's.  How far a state is
    stands inside it: copying and touching files changes nothing.  (None, {}) in a folder without one.  Raises UserError
    where a run would overwrite what is no state, or what cannot be read and may still be saved.
    """
    states, passed_over = [], {}
    for path in _written_in(folder):
        try:
            content = _peek(path)
        except UserError as error:
            passed_over[path] = str(error)
            continue
        if not is_training_state(content):
            raise UserError(
                f"'{path}' is not the state of a run and would be overwritten; move it away, or choose another --tag"
            )
        states.append((_position(content), path.stem == "last", path))
    for *_, path in sorted(states, reverse=True):
        try:
            (read_plain if path.is_dir() else read_checkpoint)(path)  # to its end: a bit may have flipped
            return path, passed_over
        except UserError as error:
            passed_over[path] = str(error)
    if passed_over:
        raise UserError(
            f"no checkpoint in '{folder}' can be read ({'; '.join(passed_over.values())}); move them away to start over"
        )
    return None, passed_over


def read_plain(folder: Path) -> dict[str, Any]:
    """All but the tensors of a state in shares.  Raises UserError where a file of it is not as it was written."""
    content = read_checkpoint(folder / PLAIN)
    for name, written in content.get(SUMS, {}).items():
        path = folder / Path(name).name
        try:
            found = checksum(path)
        except OSError as error:
            raise cannot_read(path, error) from error
        if found != written:
            raise UserError(f"'{path}' is damaged: its sum is another than when it was written")
    return content


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            found = zlib.crc32(part, found)
    return found


def _written_in(folder: str | Path) -> Iterator[Path]:
    if Path(folder).is_dir():
        yield from sorted(path for path in Path(folder).iterdir() if _WRITTEN.fullmatch(path.name))


def headline_of(path: Path) -> float | None:
    """What the weights of the state at `path` were found to be worth; None where there is none or it does not tell."""
    if not is_there(path):
        return None
    content = _peek(path)
    found = content.get("headline", max(content.get("best", {}).values(), default=None))
    return found if isinstance(found, (int, float)) else None


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
    """What the file holds, tensors left on the disk, or a folder of shares without them.  Raises UserError where it
    cannot be read."""
    path = path / PLAIN if path.is_dir() else path
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # another kind of file, or a damaged one: it is read whole, which says which
        return read_checkpoint(path)
