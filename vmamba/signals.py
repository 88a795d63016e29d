"""The signals that ask a run to stop, and what becomes of them in its child processes."""

import multiprocessing
import os
import signal
import threading

# A launcher's end, schedulers' warnings before it, a terminal that closes; those that this system has.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)


def leave_them_to_the_parent() -> None:
    """In a child process: stop signals, which schedulers send to every process of a job, end it only when they come
    from its parent.  The parent finishes its step, with what its children still load, and then ends them."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda signum, frame: None)
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):  # which tells the sender; macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_obey, args=(parent.pid,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
