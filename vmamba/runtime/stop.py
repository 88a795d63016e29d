"""Stopping on a signal: a step or a batch of an evaluation is ended, and the state saved where something is trained;
all else ends at once.  The exit code says so."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from vmamba.runtime.distributed import World, gather, sum_over_processes
from vmamba.signals import STOP_SIGNALS


class Stopped(BaseException):
    """A run was asked to stop and has saved its state, which the same command resumes; or it had nothing to save.

    As KeyboardInterrupt it is no Exception: it may be raised anywhere, and what handles errors there is not meant.
    """

    def __init__(
        self, signum: int, checkpoint: Path | None = None, without: str = "nothing was trained since the start"
    ):
        name = signal.Signals(signum).name
        saved = f"saved {checkpoint}; the same command resumes" if checkpoint else without
        super().__init__(f"stopped by {name}; {saved}")
        self.signum, self.checkpoint = signum, checkpoint


class StopRequest:
    """While it is entered, a stop signal raises Stopped instead of ending the process; inside of `noting` it is noted.

    A signal that the process was started to ignore (nohup) stays ignored.  In a thread, where Python takes no signals,
    the process keeps what it does at them.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._only_note = False

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            taken = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
            self._previous = {signum: signal.signal(signum, self._take) for signum in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def noting(self) -> Iterator[None]:
        self._only_note = True
        try:
            yield
        finally:
            self._only_note = False

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if not self._only_note:
            raise Stopped(signum)
        self.signum = self.signum or signum

    @property
    def noted(self) -> bool:
        return self.signum is not None

    def noted_by_any(self, world: World) -> bool:
        """Whether any process noted one; all call this at the same place."""
        return sum_over_processes(torch.zeros((), device=world.device).fill_(self.noted)).item() > 0

    def agreed_signal(self) -> int:
        """The signal that any process received; all call this once they know that one did."""
        return next(signum for signum in gather(self.signum) if signum is not None)
