"""Checkpoints on disk: written beside the old one and renamed, read without running what they hold."""

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from vmamba.errors import UserError


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


def read_checkpoint(path: str | Path) -> Any:
    """What the file holds, tensors on the CPU; nothing pickled but tensors and plain Python values is unpacked.

    Raises UserError, naming the file, when it is missing, truncated or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'; check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported" not in str(error).lower():  # a global, an opcode
            raise UserError(f"'{path}' is not a checkpoint of PyTorch, or a damaged one") from error
        raise UserError(
            f"'{path}' holds pickled objects besides tensors and plain values, and loading those would run their code; "
            f"save its weights alone (a state dict) and load that"
        ) from error
    except PermissionError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except Exception as error:  # bytes that are not a checkpoint fail in as many ways as there are bytes
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"'{path}' is truncated or not a checkpoint ({reason})") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The plain weights in a checkpoint of ours, or a file that is a state dict itself."""
    content = read_checkpoint(path)
    weights = content.get("model", content) if isinstance(content, Mapping) else None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"'{path}' holds no weights: neither a state dict nor one under 'model'")
    return dict(weights)


def read_ema_weights(path: str | Path) -> dict[str, Tensor] | None:
    """The EMA weights in a checkpoint of ours, or None where there are none."""
    content = read_checkpoint(path)
    return content.get("model_ema") if isinstance(content, Mapping) else None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict whose names and shapes are exactly the model's.

    Raises UserError, naming `source` and listing what is missing, unexpected or of another shape, and loads nothing.
    """
    own = model.state_dict()
    shapes = {
        name: f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    }
    differences = [
        _listed("missing", own.keys() - weights.keys()),
        _listed("unexpected", weights.keys() - own.keys()),
        _listed("of another shape", shapes.values()),
    ]
    if any(differences):
        raise UserError(f"'{source}' is of another architecture: {'; '.join(filter(None, differences))}")
    model.load_state_dict(weights)


def _listed(kind: str, names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind}: {', '.join(names[:most])}{more}" if names else ""


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
