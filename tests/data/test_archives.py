"""Archives: what is read, how often, from where, and what a damaged one says."""

import ctypes
import logging
import mmap
import multiprocessing
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vmamba.data import archives
from vmamba.data.archives import Archive
from vmamba.data.images import UnreadableImage, reading
from vmamba.errors import UserError


def contents(count: int, size: int = 500) -> list[bytes]:
    random = np.random.default_rng(0)
    return [random.integers(0, 20, size + i, dtype=np.uint8).tobytes() for i in range(count)]


def make(path: Path, files: list[bytes], compression: int = zipfile.ZIP_STORED) -> list[str]:
    """An archive of `files` in an order of its own, and their names in the order of `files`."""
    names = [f"n{i % 3}/a {i}.png" for i in range(len(files))]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for i in sorted(range(len(files)), key=lambda i: i * 7 % 10):
            archive.writestr(names[i], files[i])
    return names


def read_all(archive: Archive) -> list[bytes]:
    return [archive.read(i) for i in range(len(archive))]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("before", [b"", b"a program that unpacks itself"])
def test_files_are_read_by_number(tmp_path, compression, before):
    files = contents(10)
    path = tmp_path / "train.zip"
    names = make(path, files, compression)
    path.write_bytes(before + path.read_bytes())
    archive = Archive(path, [*names, names[4]])
    assert read_all(archive) == [*files, files[4]]
    archive.hold()
    path.unlink()
    assert read_all(archive) == [*files, files[4]]  # held: the file is no longer needed


def test_without_reading_at_a_place_as_on_windows(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "pread")
    files = contents(10)
    archive = Archive(tmp_path / "a.zip", make(tmp_path / "a.zip", files))
    archive.read_ahead(0, 1)
    assert read_all(archive) == files


def test_the_directory_is_read_once_for_all_processes(tmp_path, monkeypatch):
    files = contents(10)
    names = make(tmp_path / "a.zip", files)
    archive = Archive(tmp_path / "a.zip", names)

    def again(*_, **__):
        raise AssertionError("the directory is read again")

    monkeypatch.setattr(zipfile, "ZipFile", again)
    copy = pickle.loads(pickle.dumps(archive))  # as a spawned worker gets it
    assert read_all(copy) == files
    assert len(pickle.dumps(archive)) < 1500 + 30 * len(files)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_read_through_one_open_file(tmp_path):
    files = contents(10, size=100_000)
    archive = Archive(tmp_path / "a.zip", make(tmp_path / "a.zip", files))

    def check(wrong) -> None:
        for _ in range(100):
            wrong.value += read_all(archive) != files

    context = multiprocessing.get_context("fork")
    wrong = context.Value("i")
    processes = [context.Process(target=check, args=(wrong,)) for _ in range(3)]
    for process in processes:
        process.start()
    check(wrong)
    for process in processes:
        process.join()
    assert wrong.value == 0 and not any(process.exitcode for process in processes)


def in_page_cache(path: Path) -> np.ndarray:
    """Of each page of a file, whether the system has it in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        start = ctypes.c_char.from_buffer(view)
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view))
        assert libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)) == 0
        del start
    return pages % 2 == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for what is in the page cache")
def test_read_ahead_by_all_processes_every_read_of_training_is_a_hit(tmp_path):
    """Counted over two epochs whose images are dealt to two processes anew in each; keeping a share in each process
    gave half, and an eighth with eight."""
    path, files, processes = tmp_path / "a.zip", contents(60, size=200_000), 2
    names = make(path, files)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_page_cache(path).any():
        pytest.skip("this file system lets nobody empty the page cache")
    ranks = [Archive(path, names) for _ in range(processes)]
    assert in_page_cache(path).mean() < 0.5  # of what was read with the directory
    for rank, archive in enumerate(ranks):
        archive.read_ahead(rank, processes)
    cached, hits, reads = in_page_cache(path), 0, 0
    for epoch in range(2):
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(epoch)).tolist()
        for rank, archive in enumerate(ranks):
            for index in order[rank::processes]:
                header, size = (int(archive._table[index][field]) for field in ("header", "packed"))
                hits += cached[header // mmap.PAGESIZE : (header + size) // mmap.PAGESIZE + 1].all()
                reads += archive.read(index) == files[index]
    assert reads == 2 * len(files) and hits == reads


def test_an_archive_is_read_ahead_in_its_order_each_process_its_part(tmp_path, monkeypatch):
    files = contents(10, size=10_000)
    path = tmp_path / "a.zip"
    archive = Archive(path, make(path, files))
    monkeypatch.setattr(archives, "_PIECE", 7000)
    read = []
    monkeypatch.setattr(archive.files[0], "read", lambda place, length: read.append((place, length)))
    for rank in range(3):
        archive.read_ahead(rank, 3)
    places = [place for place, _ in read]
    assert places[0] == 0 and places == sorted(places)
    assert all(place + length == following for (place, length), following in zip(read[:-1], places[1:], strict=True))
    assert sum(read[-1]) == path.stat().st_size


def test_an_archive_larger_than_memory_is_not_read_ahead(tmp_path, monkeypatch, caplog):
    archive = Archive(tmp_path / "a.zip", make(tmp_path / "a.zip", contents(3)))
    monkeypatch.setattr(archives, "_machine_memory", lambda: 1000)
    monkeypatch.setattr(archive.files[0], "read", None)
    with caplog.at_level(logging.INFO, "vmamba"):
        archive.read_ahead(0, 1)
    assert "a.zip' is larger than the machine's memory and is not read ahead" in caplog.text


def test_an_archive_that_memory_does_not_hold(tmp_path):
    archive = Archive(tmp_path / "a.zip", make(tmp_path / "a.zip", contents(3)))
    archive.files[0].size = 2**62
    with pytest.raises(
        UserError, match=r"a.zip' does not fit into memory \(4611686018.4 GB\); choose DATA.CACHE_MODE part"
    ):
        archive.hold()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_whatever_is_damaged_is_told_of_the_file_alone(tmp_path, compression, held):
    """Bytes of a file, its header, what the directory says of it."""
    files = contents(10)
    path = tmp_path / "a.zip"
    names = make(path, files, compression)
    with zipfile.ZipFile(path) as archive:
        headers = [archive.getinfo(name).header_offset for name in names]
        directory = archive.start_dir
    data = bytearray(path.read_bytes())
    start = headers[2] + 30 + len(names[2]) + 10
    data[start : start + 60] = b"\xa5" * 60
    data[headers[5] : headers[5] + 4] = b"????"
    entry = data.index(names[7].encode(), directory) - 46
    data[entry + 24 : entry + 28] = (2**31 - 1).to_bytes(4, "little")  # its size: more than there is
    path.write_bytes(data)
    archive = Archive(path, names)
    if held:
        archive.hold()
    for index, name in enumerate(names):
        if index in (2, 5, 7):
            with pytest.raises(UnreadableImage, match=f"cannot read '{name}': [^\n]+$"), reading(name):
                archive.read(index)
        else:
            assert archive.read(index) == files[index]


@pytest.mark.parametrize("bytes_left", [0, 10, 3000])
def test_a_truncated_archive_is_a_sentence(tmp_path, bytes_left):
    names = make(tmp_path / "a.zip", contents(10))
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:bytes_left])
    with pytest.raises(UserError, match="a.zip' is not a zip archive, or is truncated or damaged: "):
        Archive(tmp_path / "a.zip", names)


def test_an_archive_without_its_beginning_is_a_sentence(tmp_path):
    names = make(tmp_path / "a.zip", contents(10))
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[50:])
    with pytest.raises(UserError, match="a.zip' is .*damaged: 'n0/a 0.png' begins before the archive, whose first"):
        Archive(tmp_path / "a.zip", names)


def test_files_that_an_archive_lacks_are_told_when_it_is_opened(tmp_path):
    names = make(tmp_path / "a.zip", contents(10))
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("n3/", "")
    with pytest.raises(UserError, match=r"a.zip' lacks 1 of the 11 files listed for it, the first is 'n3/x\\n.png';"):
        Archive(tmp_path / "a.zip", [*names, "n3/x\n.png"])
    for prefix in ("./", "train/"):
        message = rf"lacks 10 of the 10 files listed for it, the first is '{prefix}n0/a 0.png'; it holds n0/a 0.png, n"
        with pytest.raises(UserError, match=message):
            Archive(tmp_path / "a.zip", [prefix + name for name in names])


def test_any_damage_of_a_directory_is_a_sentence(tmp_path):
    """Every byte of the directory in turn: what is read is right, or a sentence."""
    files = contents(4, size=20)
    path = tmp_path / "a.zip"
    names = make(path, files)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    outcomes = set()
    for place in range(start, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            archive = Archive(path, names)
        except UserError as error:
            outcomes.add("\n" not in str(error) and "refused")
            continue
        for index in range(len(files)):
            try:
                with reading(names[index]):
                    outcomes.add(archive.read(index) == files[index] and "right")
            except UnreadableImage:
                outcomes.add("told")
    assert outcomes == {"refused", "right", "told"}


def test_rare_ways_to_pack_are_named(tmp_path):
    names = make(tmp_path / "a.zip", contents(2), zipfile.ZIP_BZIP2)
    with pytest.raises(
        UserError, match=re.escape("holds 'n0/a 0.png' compressed by method 12; make the archive again")
    ):
        Archive(tmp_path / "a.zip", names)
    names = make(tmp_path / "a.zip", contents(2))
    data = (tmp_path / "a.zip").read_bytes()
    entry = data.index(b"PK\1\2")
    (tmp_path / "a.zip").write_bytes(data[: entry + 8] + b"\1" + data[entry + 9 :])
    with pytest.raises(UserError, match="holds 'n0/a 0.png' encrypted; make the archive again"):
        Archive(tmp_path / "a.zip", names)


def test_an_archive_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="cannot read '.*a.zip': Permission denied; make it readable"):
        Archive(tmp_path / "a.zip", [])
