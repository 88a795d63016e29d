"""Batches on their way to the device."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor


def feed(batches: Iterable[Any], device: torch.device, finish: Callable[[Any], Any]) -> Iterator[Any]:
    """`batches` on `device`, made whole there by `finish`.

    To a GPU a batch is copied on a stream of its own, beside what is still computed of the one before; the process does
    not wait for that where the batch is in page-locked memory (DATA.PIN_MEMORY).
    """
    if device.type != "cuda":
        for batch in batches:
            yield finish(to_device(batch, device))
        return
    stream = _copying(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            sent = finish(to_device(batch, device))
        caller = torch.cuda.current_stream(device)
        caller.wait_stream(stream)
        for tensor in _tensors(sent):
            tensor.record_stream(caller)  # else its memory would be given to the next copy while it is still read
        yield sent


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders, so that what `finish` keeps on the device is only ever used on the stream that made it."""
    return torch.cuda.Stream(device)


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors, inside of sequences and mappings too, on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
