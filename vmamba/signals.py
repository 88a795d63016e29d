"""The signals that ask a run to stop."""

import signal

# A launcher's end, schedulers' warnings before it, a terminal that closes; those that this system has.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)


def leave_them_to_the_parent() -> None:
    """In a child process: stop signals, which schedulers send to every process of a job, do not end it.

    The parent finishes its step, with what its children still load, and then ends them (with SIGKILL, if need be).
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
