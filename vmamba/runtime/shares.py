"""Checkpoints of a state in shares: folders, written by all processes through torch.distributed.checkpoint.

The tensors are in them as each process has them, and any number of processes reads them; `plain.pth` has all else.
This module is imported where it is needed: what PyTorch imports for it is much, and not there on every system.
"""

import os
import pickle
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from vmamba.errors import UserError
from vmamba.files import cannot_read, cannot_write, check_writable, make_folder
from vmamba.models.formats import PLAIN
from vmamba.runtime.checkpoint import SUMS, checksum, nth, read_plain, save_checkpoint
from vmamba.runtime.distributed import gather, on_main
from vmamba.runtime.sharding import as_share
from vmamba.text import counted, printable

_KINDS = ("model", "model_ema")
_BETWEEN = "|"  # the parts of a tensor's name in a folder, which no parameter's name has
_TRUSTED = {  # what torch.distributed.checkpoint pickles of tensors: kinds of things, no functions that do anything
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


def save_folder(state: Mapping[str, Any], path: Path, keep: int) -> None:
    """Write a state of all processes as the folder `path`, the one there before becoming the second of `keep`; all call
    it.  Raises UserError where that fails, the old folders being untouched."""
    beside = path.with_name(on_main(lambda: f".{path.name}.{secrets.token_hex(4)}.tmp"))
    on_main(lambda: make_folder(beside))
    tensors, plain = _parted(state)
    try:
        dcp.save(tensors, storage_writer=FileSystemWriter(beside))
    except CheckpointException as error:
        on_main(lambda: shutil.rmtree(beside, ignore_errors=True))
        reasons = [reason for reason, _ in error.failures.values()]
        for reason in reasons:
            for each in (reason, reason.__context__):
                if isinstance(each, OSError):
                    raise cannot_write(path, each) from error
        raise
    sums = {name: sum_ for mine in gather(_sums_of_mine(beside)) for name, sum_ in mine.items()}
    on_main(lambda: _publish({**plain, SUMS: sums}, beside, path, keep))


def _sums_of_mine(folder: Path) -> dict[str, int]:
    """Of the files there that this process has written: it surely sees them, and the system has them in memory yet."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {path.name: checksum(path) for path in mine}


def _publish(plain: Mapping[str, Any], beside: Path, path: Path, keep: int) -> None:
    """What is renamed away last is a whole state, and so is what is removed after: at any moment one is there."""
    try:
        with (beside / PLAIN).open("xb") as file:
            torch.save(dict(plain), file)
            file.flush()
            os.fsync(file.fileno())
        for number in range(max(keep, 2), 1, -1):
            before, after = nth(path, number - 1), nth(path, number)
            if before.exists():
                shutil.rmtree(after, ignore_errors=True)
                before.rename(after)
        beside.rename(path)
        if keep == 1:
            shutil.rmtree(nth(path, 2), ignore_errors=True)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise cannot_write(path, error) from error


def read_folder(path: Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state in a folder, of whatever number of processes.

    `like`: a state whose tensors are in shares, as this process shall have those that it reads; all processes call it.
    Else they are whole.  Raises UserError where the folder is no such state, or damaged.
    """
    plain = on_main(lambda: read_plain(path))
    reader = _Reader(path)
    try:
        described = reader.read_metadata().state_dict_metadata
        tensors = {name: _place_for(name, found, like) for name, found in described.items()}
        with warnings.catch_warnings():  # PyTorch would tell whoever asks for it that no_dist is what it is
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=_Reader(path), no_dist=like is None or not dist.is_initialized())
        return _joined(tensors, plain)
    except OSError as error:
        raise cannot_read(path, error) from error
    except (CheckpointException, Exception) as error:  # damaged files fail in many ways; the first is no Exception
        raise UserError(f"'{path}' is damaged, or no state that a run has written: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """In a line, without the traceback that a CheckpointException makes of the processes' errors."""
    if isinstance(error, CheckpointException):
        error = next((reason for reason, _ in error.failures.values()), error)
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]


def distributed_as(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with its whole tensors in shares, where those of `like` are; all processes call it with the same."""
    tensors, plain = _parted(state)
    return _joined({name: as_share(tensor, _example(name, like)) for name, tensor in tensors.items()}, plain)


def _place_for(name: str, found: Any, like: Mapping[str, Any] | None) -> Tensor:
    if not isinstance(found, TensorStorageMetadata):
        raise ValueError(f"'{name}' is no tensor")
    example = _example(name, like) if like else None
    if isinstance(example, DTensor) and example.shape == found.size:
        return torch.zeros_like(example, dtype=found.properties.dtype)
    return torch.zeros(found.size, dtype=found.properties.dtype)


def _example(name: str, like: Mapping[str, Any]) -> Tensor | None:
    """The tensor of a state that one called `name` is shaped as: itself, or for a moment its parameter."""
    kind, inside, *_ = name.split(_BETWEEN)
    if kind in _KINDS:
        return (like[kind] or {}).get(inside)
    parameters = like["parameters"]
    return parameters[int(inside)] if int(inside) < len(parameters) else None


def _parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors of model, EMA and optimiser by name, all else)."""
    tensors = {f"{kind}{_BETWEEN}{name}": tensor for kind in _KINDS for name, tensor in (state.get(kind) or {}).items()}
    optimizer = state["optimizer"]
    rest: dict[int, dict[str, Any]] = {}
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer{_BETWEEN}{index}{_BETWEEN}{name}"] = value
            else:
                rest.setdefault(index, {})[name] = value
    plain = {name: value for name, value in state.items() if name not in _KINDS}
    return tensors, plain | {"optimizer": {**optimizer, "state": rest}}


def _joined(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    weights: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
    optimizer = {index: dict(values) for index, values in plain["optimizer"]["state"].items()}
    for name, tensor in tensors.items():
        kind, inside, *more = name.split(_BETWEEN)
        if kind in _KINDS:
            weights[kind][inside] = tensor
        else:
            optimizer.setdefault(int(inside), {})[more[0]] = tensor
    found = {kind: named or None for kind, named in weights.items()}
    kept = {name: value for name, value in plain.items() if name != SUMS}
    return {**kept, **found, "optimizer": {**plain["optimizer"], "state": optimizer}}


def one_file(folder: str, output: str = "all.pth") -> None:
    """Write a state in shares as the one file that a run on one GPU, or under DDP, would have saved.

    Raises UserError where `folder` is none, and where `output` is there or cannot be written.
    """
    check_writable(output)
    if Path(output).exists():
        raise UserError(f"'{printable(output)}' is there already; remove it, or choose another file")
    if not (Path(folder) / PLAIN).is_file():
        raise UserError(f"'{printable(folder)}' is no state in shares; name a folder such as last.sharded of a run")
    state = read_folder(Path(folder))
    save_checkpoint(state, output)
    print(f"the state in {folder}, after {counted(state['step'], 'step')}, is in {output}")


class _Reader(FileSystemReader):
    """Unpickles nothing but descriptions of tensors, of a folder that others may have written."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = _Described(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Described(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _TRUSTED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and loading that could run code")
