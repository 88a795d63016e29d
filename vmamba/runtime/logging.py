"""What a run tells: the log and the progress bar.  Whatever becomes of a stream or a file, telling never ends a run."""

import logging
import math
import shutil
import sys
import time
import traceback
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from termcolor import colored
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.files import cannot_write, make_folder
from vmamba.runtime.distributed import World, on_main
from vmamba.runtime.lifeline import PeerLost
from vmamba.runtime.stop import Stopped
from vmamba.runtime.streams import Tolerant
from vmamba_kernels import BackendError

try:
    import resource
except ImportError:  # Windows tells no peak of memory this way
    resource = None


class _Console(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        stdout = Tolerant(sys.stdout)
        tqdm.write(self.format(record), file=stdout)
        stdout.flush()


class _LogFile(logging.FileHandler):
    """Says once, on the console, that the file takes no more."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            Tolerant(sys.stderr).write(f"cannot write '{self.baseFilename}': {sys.exc_info()[1]}; the run goes on\n")


def create_logger(world: World, folder: Path | None = None) -> logging.Logger:
    """The logger "vmamba": rank 0 writes to stdout and appends to log.txt in `folder`, the others only warn.

    Lines of level DEBUG (single steps) go to the file, and to stdout only where that is no terminal: there a bar
    shows them.  Raises UserError when the folder cannot be written.
    """
    logger = logging.getLogger("vmamba")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.DEBUG if world.main else logging.WARNING)
    console = _Console(logging.INFO if on_terminal() else logging.DEBUG)
    moment = colored("%(asctime)s", "green") if Tolerant(sys.stdout).isatty() else "%(asctime)s"
    console.setFormatter(logging.Formatter(f"{moment} %(message)s", "%H:%M:%S"))
    logger.addHandler(console)
    if folder:
        on_main(lambda: logger.addHandler(_file_handler(folder)))
    return logger


def take_over_the_log(logger: logging.Logger, folder: Path) -> None:
    """Let this process write the end into the log of a run whose rank 0, which kept it, is gone."""
    if (folder / "log.txt").exists():
        logger.addHandler(_file_handler(folder))


def _file_handler(folder: Path) -> logging.Handler:
    make_folder(folder)
    try:
        handler = _LogFile(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise cannot_write(folder, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def log_the_end(logger: logging.Logger, error: BaseException) -> None:
    """Put what ends a run into its log, of a bug the traceback; the console gets it from the door."""
    logger.error(f"the run ends: {story(error) or cause(error)}", extra={"file_only": True})


def cause(error: BaseException) -> str:
    """What ends a run, in a line."""
    if _is_expected(error):
        return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    return f"{type(error).__name__}: {error}"


def story(error: BaseException) -> str:
    """The traceback of a bug, also of another process's; "" of what is none."""
    if isinstance(error, PeerLost):
        return f"{error}\n{error.loss.story}" if error.loss.story else ""
    return "" if _is_expected(error) else "".join(traceback.format_exception(error)).strip()


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (UserError, BackendError, Stopped, KeyboardInterrupt))


def on_terminal() -> bool:
    return Tolerant(sys.stdout).isatty() and Tolerant(sys.stderr).isatty()


def progress(items: Collection, world: World, title: str) -> tqdm:
    """`items`, with a bar of rate and time left on rank 0's terminal."""
    size = shutil.get_terminal_size()  # tqdm itself shows nothing on a terminal that tells no size
    shown = world.main and on_terminal()
    return tqdm(
        items,
        desc=title,
        leave=False,
        disable=not shown,
        ncols=size.columns,
        nrows=size.lines,
        file=Tolerant(sys.stderr),
    )


def memory_mb(device: torch.device) -> float:
    """The peak of memory so far: of the GPU's allocations, or of the process on a CPU (nan where nothing tells it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def megabytes(memory: float) -> str:
    """ "512MB", or "unknown" for nan."""
    return "unknown" if math.isnan(memory) else f"{memory:.0f}MB"


class Pace:
    """Iterates over micro-batches and tells how long the steps took that were made of them."""

    def __init__(self, batches: Iterable, step: int):
        self._batches = iter(batches)
        self._start, self._step, self._waiting = time.perf_counter(), step, 0.0

    def __iter__(self) -> "Pace":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self._batches)
        self._waiting += time.perf_counter() - start
        return batch

    def lap(self, step: int) -> tuple[float, float]:
        """Seconds a step since the last lap, and how many of them went by waiting for data; `step` are completed."""
        now, steps = time.perf_counter(), step - self._step
        seconds, waiting = (now - self._start) / steps, self._waiting / steps
        self._start, self._step, self._waiting = now, step, 0.0
        return seconds, waiting
