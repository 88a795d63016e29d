"""Standard output and error that never end a run, whatever becomes of them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any


class Tolerant:
    """A stream that takes what it can of what is written, and loses the rest: characters that its encoding lacks, and
    everything once its other end is gone (a closed terminal, `| head`)."""

    def __init__(self, stream: IO[str] | None):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115  (a program without a console has none)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Let standard output and error be tolerant, also of what Python writes out at the very end."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Tolerant, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, before):
            try:
                stream.flush()
            except (OSError, ValueError):
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
