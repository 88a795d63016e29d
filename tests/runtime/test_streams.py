"""What is told, to whatever stream, never ends a run."""

import io
import os
import sys

import pytest

from vmamba.runtime.cli import exit_code
from vmamba.runtime.streams import Tolerant


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [broken_pipe, closed, lambda: None])
def test_a_stream_that_takes_nothing(make, monkeypatch):
    stream = Tolerant(make())
    for _ in range(3):
        stream.write("a line\n")
        stream.flush()
    assert not stream.isatty()
    monkeypatch.setattr(sys, "stdout", make())
    assert exit_code(lambda: print("a line")) == 0


def test_what_an_encoding_lacks_is_escaped():
    raw = io.BytesIO()
    stream = Tolerant(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    stream.write("folder oä, name \udcff\n")
    assert raw.getvalue() == b"folder o\\xe4, name \\udcff\n"
