"""Stopping on a signal: the step or the evaluation in progress ends, the state is saved, and the exit code says so."""

import signal
import threading
from pathlib import Path
from types import FrameType

import torch

from vmamba.runtime.distributed import World, gather, sum_over_processes
from vmamba.signals import STOP_SIGNALS


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the same command resumes it."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {checkpoint}; the same command resumes")
        self.signum = signum


class StopRequest:
    """While it is entered, a stop signal is noted instead of ending the process.

    A signal that the process was started to ignore (nohup) stays ignored.  In a thread, where Python takes no signals,
    the process keeps what it does at them.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            noted = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
            self._previous = {signum: signal.signal(signum, self._note) for signum in noted}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
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
