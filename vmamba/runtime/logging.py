"""What a run tells: the log, the progress bar, one JSON line an epoch."""

import json
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from termcolor import colored
from tqdm import tqdm

from vmamba.files import cannot_write, write_atomically
from vmamba.runtime.distributed import World, on_main


class _Console(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


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
    moment = colored("%(asctime)s", "green") if sys.stdout.isatty() else "%(asctime)s"
    console.setFormatter(logging.Formatter(f"{moment} %(message)s", "%H:%M:%S"))
    logger.addHandler(console)
    if folder:
        on_main(lambda: logger.addHandler(_file_handler(folder)))
    return logger


def _file_handler(folder: Path) -> logging.Handler:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def on_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(items: Collection, world: World, title: str) -> Iterable:
    """`items`, with a bar of rate and time left on rank 0's terminal."""
    size = shutil.get_terminal_size()  # tqdm itself shows nothing on a terminal that tells no size
    shown = world.main and on_terminal()
    return tqdm(items, desc=title, leave=False, disable=not shown, ncols=size.columns, nrows=size.lines)


def memory_mb(device: torch.device) -> float:
    """The peak of memory so far: of the GPU's allocations, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs in a metrics.jsonl, in order; a line cut short by the end of a process is left out."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return sorted(metrics, key=lambda entry: entry["epoch"])


def write_metrics(path: Path, entry: dict[str, Any]) -> None:
    """Put one epoch's line into a metrics.jsonl, in the place of an earlier line of that epoch."""
    entry = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
    metrics = {old["epoch"]: old for old in read_metrics(path)} | {entry["epoch"]: entry}
    lines = [json.dumps(metrics[epoch]) for epoch in sorted(metrics)]
    write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))
