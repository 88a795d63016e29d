"""Saving a state while training goes on: from a copy of it, by a thread that writes one file at a time."""

import copy
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmamba.errors import UserError
from vmamba.files import copy_atomically
from vmamba.runtime.checkpoint import BEST, LAST, headline_of, make_room, nth, save_checkpoint

logger = logging.getLogger("vmamba")


class Saver:
    """Of rank 0: the last `keep_last` and the best `keep_best` states of a run in `folder`.

    `start` returns as soon as the state is copied; a write that fails is logged at once, and raised by what is called
    next.  A state of two names is two files, so that damage to one of them is not damage to both.
    """

    def __init__(self, folder: Path, keep_last: int = 1, keep_best: int = 1):
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.last_step: int | None = None  # of the state in LAST, where that is known to be whole
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, state: Any, names: Sequence[str]) -> None:
        """Save `state` as LAST, or among the BEST, or both.  Raises UserError where the write before has failed."""
        self.wait()
        place = self._place(state) if BEST in names else self.keep_best + 1
        if LAST not in names and place > self.keep_best:
            return
        content, copied = self._copies.of(state.state_dict())
        self._thread = threading.Thread(target=self._write, args=(content, copied, LAST in names, place), name="saving")
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until all is written.  Raises UserError where that failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """As `wait`, at the end of a run that may have another cause: what failed is logged already."""
        if self._thread:
            self._thread.join()

    def _place(self, state: Any) -> int:
        """Among the best states, by what each was found to be worth."""
        if not state.unimproved:
            return 1
        kept = [headline_of(nth(self.folder / BEST, number)) for number in range(1, self.keep_best + 1)]
        return 1 + sum(value is not None and value >= state.headline for value in kept)

    def _write(self, content: dict[str, Any], copied: "torch.cuda.Event | None", as_last: bool, place: int) -> None:
        best, last = self.folder / BEST, self.folder / LAST
        path = last if as_last else nth(best, place)

        def publish(written: Path) -> None:
            if place <= self.keep_best:  # before LAST: what a resumed run takes for the best is there then
                make_room(best, place, self.keep_best)
                if as_last:
                    copy_atomically(written, nth(best, place))
            if as_last and self.last_step not in (None, content["step"]):
                make_room(last, 1, self.keep_last)

        try:
            if copied:
                copied.synchronize()
            save_checkpoint(content, path, publish)
            self.last_step = content["step"] if as_last else self.last_step
        except BaseException as error:
            self._error = error
            if isinstance(error, UserError):
                logger.error(f"{error}; the run ends where it would save next")


class Copies:
    """Copies of nested states on the CPU, of tensors on a GPU in page-locked memory that is used again and again."""

    def __init__(self) -> None:
        self._memory: dict[tuple, Tensor] = {}

    def of(self, state: dict[str, Any]) -> tuple[dict[str, Any], "torch.cuda.Event | None"]:
        """A copy of `state` as it is now, and, where the GPU has yet to make it, what tells that it has.

        The GPU copies between what it computes, before and after, so that no tensor is caught half updated; the process
        does not wait for it.
        """
        copies: dict[tuple, Tensor] = {}
        found = self._copy(state, copies)
        self._memory = {key: tensor for key, tensor in copies.items() if tensor.is_pinned()}
        if not self._memory:
            return found, None
        event = torch.cuda.Event()
        event.record()
        return found, event

    def _copy(self, value: Any, copies: dict[tuple, Tensor]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), copies)
        if isinstance(value, Mapping):
            found = copy.copy(value)  # with what a state dict has beside its items
            for key, item in value.items():
                found[key] = self._copy(item, copies)
            return found
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, copies) for item in value)
        return value

    def _copy_tensor(self, tensor: Tensor, copies: dict[tuple, Tensor]) -> Tensor:
        if not tensor.is_cuda:
            return tensor.clone()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in copies:  # else it is shared, and so is its copy
            memory = self._memory.get(place)
            if memory is None:
                memory = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copies[place] = memory.copy_(tensor, non_blocking=True)
        return copies[place]
