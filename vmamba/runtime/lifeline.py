"""How the processes of a run learn that one of them has ended, and why: each keeps a connection to the first.

A collective only waits, with NCCL for very long, and gloo says no more than that a connection closed.  The system
closes a process's connections however it ends; those of a machine that is gone, after half a minute of silence.
"""

import json
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from typing import Any

from torch.distributed import DistError

from vmamba.errors import UserError

SECONDS_TO_HEAR = 5.0  # that the news may come later than the broken collective
SECONDS_OF_ITS_OWN = 1.0  # after the news for an end of its own, by the same cause on all processes for one
SECONDS_TO_END = 20.0  # more, until it is ended
SECONDS_TO_CLOSE = 30.0  # for a process that is about to end, and may still be saving
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, times
_OF_A_COLLECTIVE = re.compile(
    "gloo|nccl|c10d|process ?group|store|collective|peer|broken pipe|connection|socket", re.IGNORECASE
)
_TIMED_OUT = re.compile("timed? ?out", re.IGNORECASE)

_open: "weakref.WeakSet[Lifeline]" = weakref.WeakSet()


@dataclass(frozen=True)
class Loss:
    """Which process ended, where, what it said of it, and the traceback of a bug; "" where it said nothing."""

    rank: int
    host: str
    said: str = ""
    story: str = ""

    def __str__(self) -> str:
        who = f"process {self.rank} on {self.host} has ended"
        if self.said:
            return f"{who}: {self.said}"
        return (
            f"{who} without a word: it was killed (for want of memory dmesg tells), it crashed (then its own output "
            f"tells), or its machine is gone; the same command goes on from the last checkpoint"
        )


class PeerLost(UserError):
    """Another process of the run has ended, and so does this one."""

    def __init__(self, loss: Loss):
        super().__init__(str(loss))
        self.loss = loss


class Lifeline:
    """This process's end of it.  Of a run of one process it does nothing.

    A process that hears of a loss and does not end by itself is ended; before, a thread of it calls `on_loss`.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = 0.0):
        self.rank, self.size, self.timeout = rank, size, timeout  # of collectives, in seconds
        self.loss: Loss | None = None
        self.on_loss: Callable[[PeerLost], object] = lambda error: None
        self._news, self._written = threading.Event(), threading.Event()  # the loss is known; `on_loss` was called
        self._ending = False  # by itself: it has said so, or shows the loss
        self._lines: dict[socket.socket, tuple[int, str]] = {}  # who is at the other end

    def connect(self, share: Callable[[Any], Any]) -> None:
        """All processes call it.  `share(value)` is rank 0's value, for all.  Raises OSError."""
        if self.rank == 0:
            with _server(self.size) as server:
                token = secrets.token_hex(16)
                share((server.getsockname()[1], token))
                self._accept_all(server, token)
        else:
            port, token = share(None)
            first = os.environ["MASTER_ADDR"]
            line = socket.create_connection((first, port), timeout=self.timeout)
            line.settimeout(None)
            self._lines[_kept_alive(line)] = 0, first
            _send(line, [token, self.rank, socket.gethostname()])
        _open.add(self)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def leave(self) -> None:
        """This process ends as all do."""
        self._tell(["left"])

    def fail(self, said: str, story: str = "") -> None:
        """This process ends because of what it `said`, and so shall the others."""
        self._tell(["failed", *astuple(Loss(self.rank, socket.gethostname(), said, story))])

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Let the error of a collective be what is behind it, where that is another process: PeerLost; or a UserError
        where it only waited too long.  What is of no other process is raised as it is."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            collective = isinstance(error, DistError) or _OF_A_COLLECTIVE.search(str(error))
            if self.size == 1 or not collective:
                raise
            if self._news.wait(SECONDS_TO_HEAR):
                self._written.wait(SECONDS_TO_HEAR)
                self._ending = True
                raise PeerLost(self.loss) from error
            if _TIMED_OUT.search(str(error)):
                raise UserError(
                    f"process {self.rank} waited {self.timeout:g} s (TIMEOUT) for the others: one of them hangs, where "
                    f"'py-spy dump --pid' shows, or needs longer, for which there is a higher TIMEOUT ({reason})"
                ) from error
            raise

    def close_in_child(self) -> None:
        """In a forked process, whose copies would keep the connections open when this one has ended."""
        for line in self._lines:
            line.close()

    def _accept_all(self, server: socket.socket, token: str) -> None:
        server.settimeout(self.timeout)
        while len(self._lines) < self.size - 1:
            line, _ = server.accept()
            line.settimeout(10)
            with suppress(
                OSError, ValueError, TypeError, RecursionError
            ):  # of somebody else, who does not know the token
                found, rank, host = _receive(line)
                if secrets.compare_digest(found, token):
                    line.settimeout(None)
                    self._lines[_kept_alive(line)] = rank, host

    def _tell(self, message: list[Any]) -> None:
        if self._ending:
            return
        self._ending = True
        for line in self._lines:
            with suppress(OSError):
                _send(line, message)

    def _watch(self) -> None:
        """Rank 0 hears of every process and passes on the first loss; the others hear of it from rank 0."""
        with selectors.DefaultSelector() as selector:
            for line in self._lines:
                selector.register(line, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    word, *about = _receive(key.fileobj) or ["failed", *self._lines[key.fileobj]]
                    if word == "failed":
                        return self._end(Loss(*about))

    def _end(self, loss: Loss) -> None:
        if self._ending:
            return
        self.loss = loss
        for line in self._lines if self.rank == 0 else ():
            with suppress(OSError):
                _send(line, ["failed", *astuple(loss)])
        self._news.set()
        self._let_it_end(SECONDS_OF_ITS_OWN)
        error = PeerLost(loss)
        self.on_loss(error)
        self._written.set()
        self._let_it_end(SECONDS_TO_END)
        print(f"[rank {self.rank}] error: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    def _let_it_end(self, seconds: float) -> None:
        """Wait so long; where the process has begun to end by then, for that, and not for ever."""
        time.sleep(seconds)
        if self._ending:
            time.sleep(SECONDS_TO_CLOSE)
            os._exit(1)


def _server(size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=size + 128)
    return socket.create_server(("", 0), backlog=size + 128)


def _kept_alive(line: socket.socket) -> socket.socket:
    """So that silence of the machine at the other end is its end; the system asks and answers, whatever Python does."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line


def _send(line: socket.socket, message: list[Any]) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def _receive(line: socket.socket) -> list[Any] | None:
    """The next message; None where the other end is gone."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            if not (part := line.recv(2**16)) or len(text) > 2**20:
                return None
            text += part
    except OSError:
        return None
    return json.loads(text)


def _close_in_child() -> None:
    for lifeline in _open:
        lifeline.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
