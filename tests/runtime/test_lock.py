"""One writer a folder."""

import os

import pytest

from vmamba.errors import UserError
from vmamba.runtime import lock as lock_module
from vmamba.runtime.lock import FolderLock


def in_another_process(folder) -> str:
    """What acquiring the lock of `folder` says there."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            FolderLock(folder).acquire()
            said = "free"
        except UserError as error:
            said = str(error)
        os.write(write, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read) as pipe:
        return pipe.read()


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    folder = tmp_path / "run"
    lock = FolderLock(folder)
    lock.acquire()
    for name in (".last.pth.0123abcd.tmp", ".notes.tmp"):
        (folder / name).write_text("what a killed process left, and what somebody keeps there")
    (folder / ".last.sharded.0123abcd.tmp").mkdir()
    (folder / ".last.sharded.0123abcd.tmp" / "__0_0.distcp").write_text("")
    assert f"is being written by process {os.getpid()} on " in in_another_process(folder)
    lock.release()
    (folder / ".last.sharded.0123abcd.tmp" / "__1_0.distcp").write_text("")
    assert sorted(os.listdir(folder)) == [".last.pth.0123abcd.tmp", ".last.sharded.0123abcd.tmp", ".notes.tmp"]
    assert in_another_process(folder) == "free"  # and its end frees it again, though its file stays
    lock.acquire()
    assert sorted(os.listdir(folder)) == [".lock", ".notes.tmp"]
    lock.release()


def test_a_file_that_its_holder_has_just_removed_holds_nobody_out(tmp_path, monkeypatch):
    """The holder may end between opening its file and locking it: another file has to be opened then."""
    whole, opened = lock_module._lock_for_this_process, []

    def removed_meanwhile(file):
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(file)
        return whole(file)

    monkeypatch.setattr(lock_module, "_lock_for_this_process", removed_meanwhile)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert len(opened) == 2
    assert f"is being written by process {os.getpid()} on " in in_another_process(tmp_path)
    lock.release()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        FolderLock(tmp_path / "file" / "run").acquire()
