"""Loops shared among threads: PyTorch's own where its OpenMP is GNU's, else a pool of ours.

PyTorch's threads wait for work by spinning a while, so that others that are woken meanwhile find no core free: with two
threads on two cores the pool took 22 ms of a model's scans where one thread took 27 (docs/log.md).  numba's own layers
do not serve: they do not survive a fork (GNU OpenMP) or two callers at once (its work queue).
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

PIECES = 2  # for each thread at least, so that one that is held up does less
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_of_thread = threading.local()


def share(tasks: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop), which must let go of the GIL, for ranges that make up 0..tasks, in up to
    torch.get_num_threads() threads, this one among them."""
    threads = min(torch.get_num_threads(), tasks)
    if threads < 2:
        return work(0, tasks)
    size = max(1, tasks // (PIECES * threads))  # rounded down: six tasks for two threads are no three pieces of two
    starts = deque(range(0, tasks, size))
    errors: list[BaseException] = []

    def take_pieces() -> None:
        try:
            while starts:
                try:
                    start = starts.popleft()
                except IndexError:  # another thread took the last one
                    return
                work(start, min(start + size, tasks))
        except BaseException as error:
            errors.append(error)

    team = _team()
    if team is None:
        _by_pool(threads, take_pieces)
    else:
        team(_CALLBACK(lambda _: _as_a_thread_of_python(take_pieces)), None, threads, 0)
    if errors:
        raise errors[0]


@cache
def _team() -> Callable[..., None] | None:
    """GOMP_parallel(function, data, threads, flags) of the library that PyTorch computes with; None where that is no
    GNU OpenMP, or stands outside of PyTorch's folder.  It calls the function once in each thread and waits for all."""
    libraries = Path(torch.__file__).parent.glob("lib/libgomp*.so*")
    path = next(libraries, None)
    if path is None or not torch.backends.openmp.is_available():
        return None
    function = ctypes.CDLL(str(path)).GOMP_parallel
    function.argtypes, function.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function


def _as_a_thread_of_python(take_pieces: Callable[[], None]) -> None:
    """In a thread of OpenMP, which stays one of Python's: else Python makes what it keeps of a thread for each call and
    ends it behind, 65 microseconds for which all wait."""
    if not hasattr(_of_thread, "state"):
        _of_thread.state = ctypes.pythonapi.PyGILState_Ensure()  # and no PyGILState_Release
    take_pieces()


def _by_pool(threads: int, take_pieces: Callable[[], None]) -> None:
    """A helper that is busy for others is not waited for: this thread can do everything alone."""
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


def _after_fork() -> None:
    """The threads stay behind, PyTorch's too, whose team would be waited for without end, as PyTorch's own operators
    do where it has more than one thread."""
    global _team
    _team = lambda: None  # noqa: E731
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
