"""Loops shared among threads of our own: numba's thread pools do not survive a fork (GNU OpenMP) or two callers at once
(its work queue)."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import torch

PIECES = 2  # for each thread, so that one that is held up does less


def share(tasks: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop), which must let go of the GIL, for ranges that make up 0..tasks, in up to
    torch.get_num_threads() threads, this one among them.

    A helper that is busy for others is not waited for: this thread can do everything alone.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads < 2:
        return work(0, tasks)
    size = -(-tasks // (PIECES * threads))
    starts = deque(range(0, tasks, size))

    def take_pieces() -> None:
        while starts:
            try:
                start = starts.popleft()
            except IndexError:  # another thread took the last one
                return
            work(start, min(start + size, tasks))

    helpers: list[Future] = []
    try:
        with suppress(RuntimeError):  # the interpreter ends, and gives no more help; this thread can do the rest
            for _ in range(threads - 1):
                helpers.append(_pool().submit(take_pieces))
        take_pieces()
    finally:
        running = [helper for helper in helpers if not helper.cancel()]
        for helper in running:
            helper.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="vmamba_kernels")


if hasattr(os, "register_at_fork"):  # the threads stay behind
    os.register_at_fork(after_in_child=_pool.cache_clear)
