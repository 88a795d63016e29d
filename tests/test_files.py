"""Files that one process holds at a time, on systems with and without POSIX's locks."""

import errno
import os
import sys
import threading
import time
import types
from pathlib import Path

import pytest

import vmamba
from vmamba import files
from vmamba.errors import UserError


def test_one_at_a_time_whoever_comes_and_goes(tmp_path):
    """Each reads, waits and writes; without the lock most writes would be lost."""
    count = tmp_path / "count"
    count.write_text("0")

    def add():
        for _ in range(5):
            with files.held(tmp_path / "lock"):
                before = int(count.read_text())
                time.sleep(0.002)
                count.write_text(str(before + 1))

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert count.read_text() == "30"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_without_posix_windows_locks_are_waited_for(tmp_path, monkeypatch):
    asked = []

    def locking(descriptor, mode, size):
        asked.append((mode, size))
        if len(asked) < 3:
            raise OSError(36, "Resource deadlock avoided")  # what it raises after ten seconds

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_LOCK=1))
    with files.held(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    assert asked == [(1, 1)] * 3


def test_that_a_file_cannot_be_written_is_known_before_it_is(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "new" / "folder" / "file", str(tmp_path / "other"))
    assert (tmp_path / "new" / "folder").is_dir() and not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="cannot write '.*new': it is a folder; name a file in it"):
        files.check_writable(tmp_path / "new")
    (tmp_path / "other").touch()
    with pytest.raises(UserError, match="cannot write '.*other': "):
        files.check_writable(tmp_path / "other" / "file")

    def denied(*_, **__):  # root may write nearly everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(UserError, match="cannot write '.*file': Permission denied; free"):
        files.check_writable(tmp_path / "file")


def test_names_as_long_as_a_file_system_takes_them(tmp_path):
    for name in ("a" * 255, "ä" * 127):
        files.write_text(tmp_path / name, "text")
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["text"] * 2


@pytest.mark.parametrize("name", ["a" * 256, "a\0b"])
def test_names_that_no_file_has_are_one_sentence(tmp_path, name):
    for path in (tmp_path / name, tmp_path / name / "file"):
        with pytest.raises(UserError, match="cannot write .*; choose another name$"):
            files.check_writable(path)
        with pytest.raises(UserError, match="cannot read .*; check that it is there and whole$"):
            files.read_text(path)
        for read in (vmamba.load_checkpoint, vmamba.load_model):
            with pytest.raises(UserError, match="cannot read|there is no checkpoint"):
                read(path)
