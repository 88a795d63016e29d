"""Stopping on a signal: the step in progress is finished, the state saved, and the exit code says so."""

import signal
from pathlib import Path
from types import FrameType

from vmamba.runtime.distributed import gather

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a launcher's end, and schedulers' warnings before it


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the same command resumes it."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {checkpoint}; the same command resumes")
        self.signum = signum


class StopRequest:
    """While it is entered, a stop signal is noted instead of ending the process."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def agreed_signal(self) -> int:
        """The signal that any process received; all call this once they know that one did."""
        return next(signum for signum in gather(self.signum) if signum is not None)
