"""Batches on their way to the device."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor


class Feed:
    """Iterates over `batches` on `device`, made whole there by `finish`; each is loaded when it is asked for.

    To a GPU a batch is copied on a stream of its own, beside what is still computed of the one before; the process does
    not wait for that where the batch is in page-locked memory (DATA.PIN_MEMORY).

    `ahead`: a thread loads and finishes the next batch while the caller works on the one it has got, as it should where
    `finish` waits for the GPU by itself.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device, finish: Callable[[Any], Any], ahead: bool = False):
        self._batches, self._device, self._finish = iter(batches), device, finish
        send = partial(_send, self._batches, device, finish)
        self._send = Ahead(send) if ahead else send
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
        caller = torch.cuda.current_stream(self._device)
        done = caller.record_event(torch.cuda.Event(enable_timing=True))  # passed with the work on earlier batches
        sent, arrived = self._send()
        caller.wait_event(arrived)
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


def _send(batches: Iterator[Any], device: torch.device, finish: Callable[[Any], Any]) -> tuple[Any, torch.cuda.Event]:
    """The next batch on a GPU, and what has passed when it is whole."""
    batch = next(batches)
    with torch.cuda.stream(_copying(device)):
        sent = finish(to_device(batch, device))
        return sent, _copying(device).record_event()


class Ahead:
    """A function without arguments, whose next result a thread makes while the last one is in use.  It is called as
    long as it raises nothing, and what it raises is raised in its turn."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._thread = make, ThreadPoolExecutor(1, "feed")
        self._next: Future | None = None

    def __call__(self) -> Any:
        made = (self._next or self._thread.submit(self._make)).result()
        self._next = self._thread.submit(self._make)
        return made


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
