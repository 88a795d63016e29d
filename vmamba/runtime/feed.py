"""Batches on their way to the device."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Feed:
    """Iterates over `batches` on `device`, made whole there by `finish`; each is loaded when it is asked for.

    To a GPU a batch is copied on a stream of its own, beside what is still computed of the one before; the process does
    not wait for that where the batch is in page-locked memory (DATA.PIN_MEMORY).
    """

    def __init__(self, batches: Iterable[Any], device: torch.device, finish: Callable[[Any], Any]):
        self._batches, self._device, self._finish = iter(batches), device, finish
        self._pauses: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # of a GPU, not yet added up
        self._waited = 0.0

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        return self._to_gpu() if self._device.type == "cuda" else self._to_cpu()

    def waited(self) -> float:
        """Seconds that the device had nothing to compute because a batch was not there yet; waits for the device."""
        if self._pauses:
            self._pauses[-1][1].synchronize()
        self._add_up()
        return self._waited

    def _to_cpu(self) -> Any:
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        return self._finish(to_device(batch, self._device))

    def _to_gpu(self) -> Any:
        caller, stream = torch.cuda.current_stream(self._device), _copying(self._device)
        done = caller.record_event(torch.cuda.Event(enable_timing=True))  # passed with the work on earlier batches
        batch = next(self._batches)
        with torch.cuda.stream(stream):
            sent = self._finish(to_device(batch, self._device))
        caller.wait_stream(stream)
        for tensor in _tensors(sent):
            tensor.record_stream(caller)  # else its memory would be given to the next copy while it is still read
        self._pauses.append((done, caller.record_event(torch.cuda.Event(enable_timing=True))))
        self._add_up()
        return sent

    def _add_up(self) -> None:
        """The pauses that are over."""
        while self._pauses and self._pauses[0][1].query():
            start, end = self._pauses.popleft()
            self._waited += start.elapsed_time(end) / 1000


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
