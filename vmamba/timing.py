"""How long work takes."""

import time
from collections.abc import Callable

import torch


def elapsed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, by the GPU's own clock where it runs on one."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
