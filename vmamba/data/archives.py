"""Files in zip and tar archives, read by number: any data set's, by any number of processes."""

import json
import logging
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vmamba.data.names import Names
from vmamba.errors import UserError
from vmamba.files import cannot_read, write_atomically
from vmamba.text import counted, printable, some

logger = logging.getLogger("vmamba")

_ENTRY = np.dtype([("header", "i8"), ("packed", "u8"), ("size", "u8"), ("crc", "u4"), ("deflated", "?")])
_HEADER = struct.Struct("<4s22xHH")  # before a file's bytes: signature; lengths of its name and of what follows that
_PIECE = 2**24  # bytes read at once where everything is read
_KEPT_OPEN = 256  # files of a set of archives; systems let a process have 1,024


class BytesAt:
    """The bytes of the file at `path`, read at any place by any number of processes, which share the open file: reading
    at a place moves nobody else's.

    `keep`: open; else it is opened for each reading.  Raises UserError when it cannot be read.
    """

    def __init__(self, path: str | Path, keep: bool = True):
        self.path, self.keep = Path(path), keep
        self._held: torch.Tensor | None = None  # its bytes; a tensor, since PyTorch's workers share those
        try:
            self._file = self.path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise cannot_read(self.path, error) from error
        if not keep:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def read(self, place: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the end of the file."""
        if self._held is not None:
            return self._held[place : place + length].numpy().tobytes()
        if not hasattr(os, "pread") or not self.keep:  # Windows has none
            with self.path.open("rb", buffering=0) as file:
                file.seek(place)
                return file.read(length)
        if self._file is None:  # in a spawned process
            self._file = self.path.open("rb", buffering=0)
        return os.pread(self._file.fileno(), length, place)

    def read_ahead(self, part: int, parts: int) -> None:
        """Read one of `parts` once, from its beginning to its end, and keep none of it."""
        start, end = self.size * part // parts, self.size * (part + 1) // parts
        try:
            for place in range(start, end, _PIECE):
                self.read(place, min(_PIECE, end - place))
        except OSError as error:  # whoever wants the file that lies there will meet it
            logger.warning("stopped reading '%s' ahead: %s", printable(self.path), error.strerror)

    def hold(self) -> None:
        """Read it into this process's memory.  Raises UserError where that cannot be."""
        try:
            held = torch.empty(self.size, dtype=torch.uint8)
            view, place = memoryview(held.numpy()), 0
            with self.path.open("rb", buffering=0) as file:
                while count := file.readinto(view[place : place + _PIECE]):
                    place += count
        except OSError as error:
            raise cannot_read(self.path, error) from error
        except (RuntimeError, MemoryError) as error:
            size = f"{self.size / 1e9:.1f} GB"
            raise UserError(
                f"'{printable(self.path)}' does not fit into memory ({size}); choose DATA.CACHE_MODE part"
            ) from error
        self._held = held


class _Files:
    """Archives in `files`, read ahead or held as a whole."""

    files: list[BytesAt]

    def read_ahead(self, part: int, parts: int) -> None:
        """Read one of `parts` of the archives once, from their beginnings to their ends, and keep none of it: the
        processes of a machine together read them whole, since each will want files of anywhere.

        The system keeps what was read (its page cache) for all processes of the machine, as far as its memory goes, and
        drops it when memory is wanted.  Does nothing where they are larger than the machine's memory.
        """
        size = sum(file.size for file in self.files)
        if size > _machine_memory():
            logger.info("%s is larger than the machine's memory and is not read ahead", self)
            return
        logger.info("reading %s (%.1f GB) ahead, once", self, size / 1e9)
        for file in self.files:
            file.read_ahead(part, parts)

    def hold(self) -> None:
        """Read all into this process's memory.  Raises UserError where that cannot be."""
        logger.info("reading %s (%.1f GB) into memory", self, sum(file.size for file in self.files) / 1e9)
        for file in self.files:
            file.hold()

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"'{printable(self.files[0].path)}'{more}"


class Archive(_Files):
    """The files `names` of the zip archive at `path`, by their place in `names`.

    The archive's directory is read once, here: what is kept of it is a table of 29 bytes a file, which worker processes
    share (fork) or are given (spawn).

    Raises UserError when the archive cannot be read, lacks one of the files, or holds one encrypted or compressed in a
    rare way.
    """

    def __init__(self, path: str | Path, names: Sequence[str]):
        self.path = Path(path)
        self.files = [BytesAt(path)]
        self._table = self._read_directory(names)

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> Path:
        """Of the archive that holds a file."""
        return self.path

    def read(self, index: int) -> bytes:
        """The bytes of a file.  A damaged archive may make this raise any Exception (see `images.reading`)."""
        header, packed, size, checksum, deflated = self._table[index].item()
        signature, name_length, extra_length = _HEADER.unpack(self.files[0].read(header, _HEADER.size))
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile("the archive's directory names a place where no file begins")
        data = self.files[0].read(header + _HEADER.size + name_length + extra_length, packed)
        if deflated:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise zipfile.BadZipFile("its bytes are not those that the archive's checksum is of")
        return data

    def _read_directory(self, names: Sequence[str]) -> np.ndarray:
        """The table of `names`."""
        table = np.zeros(len(names), _ENTRY)
        try:
            with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = archive.NameToInfo
            if lacking := [name for name in names if name not in members]:
                raise self._lacks(lacking, names, members)
            for index, member in enumerate(map(members.get, names)):
                self._check(member)
                deflated = member.compress_type == zipfile.ZIP_DEFLATED
                table[index] = (member.header_offset, member.compress_size, member.file_size, member.CRC, deflated)
        except UserError:
            raise
        except Exception as error:  # what is wrong in a directory may raise anything
            raise UserError(
                f"'{printable(self.path)}' is not a zip archive, or is truncated or damaged: {printable(error)}"
            ) from error
        return table

    def _lacks(self, lacking: Sequence[str], names: Sequence[str], members: Iterable[str]) -> UserError:
        return UserError(
            f"'{printable(self.path)}' lacks {len(lacking):,} of the {counted(len(names), 'file')} listed for it, the "
            f"first is '{printable(lacking[0])}'; it holds {some([name for name in members if name[-1] != '/'])}; list "
            "what it holds, as it is called there"
        )

    def _check(self, member: zipfile.ZipInfo) -> None:
        if member.header_offset < 0:
            raise zipfile.BadZipFile(f"'{member.filename}' begins before the archive, whose first bytes are missing")
        if member.flag_bits & 1:
            how = "encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = f"compressed by method {member.compress_type}"
        else:
            return
        raise UserError(
            f"'{printable(self.path)}' holds '{printable(member.filename)}' {how}; make the archive again, with "
            "files that are stored or deflated"
        )


class Tars(_Files):
    """The files in the tar archives `paths`, by number, in their order: `names`, as they are called there.

    A link, hard or symbolic, is the file of its archive that it leads to; one that leads to none cannot be read.

    Where each begins is found by going through the archives once; it is kept beside them in `index`, a file of 32 bytes
    and a name for each, for whoever opens them next while they have the same sizes and times of change.  Where it
    cannot be written, each process goes through them at its start.
    `numbers`: what a file NAME.cls says, -1 for other files (as WebDataset stores labels).

    Raises UserError for what is no tar archive, compressed, truncated or damaged, for several archives in one file, and
    for a name that comes twice in one.
    """

    def __init__(self, paths: Sequence[str | Path], index: str | Path):
        self.files = [BytesAt(path, keep=number < _KEPT_OPEN) for number, path in enumerate(paths)]
        self.names, self._table = self._load(Path(index))
        self.numbers = self._table["number"]

    def __len__(self) -> int:
        return len(self._table)

    def take(self, chosen: Sequence[int]) -> None:
        """Keep these files alone, in this order."""
        self._table = self._table[np.asarray(chosen, np.int64)]
        self.names = Names([self.names[number] for number in chosen])
        self.numbers = self._table["number"]

    def place(self, index: int) -> Path:
        """Of the archive that holds a file."""
        return self.files[self._table[index]["archive"]].path

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        archive, start, size, _ = self._table[index].item()
        if size < 0:
            raise tarfile.ReadError("it is a link, and its archive does not hold the file that it leads to")
        data = self.files[archive].read(start, size)
        if len(data) != size:
            raise tarfile.ReadError("the archive ends before it does")
        return data

    def _load(self, index: Path) -> tuple[Names, np.ndarray]:
        archives = [[file.path.name, file.size, file.path.stat().st_mtime_ns] for file in self.files]
        of = json.dumps([_FORM, *archives]).encode()
        try:
            with np.load(index, allow_pickle=False) as kept:
                if kept["of"].tobytes() == of:
                    return Names.of(kept["text"], kept["ends"]), kept["table"]
        except Exception:  # it is not there, or not whole: it is made anew
            pass
        logger.info("going through %s once, for where each file begins", self)
        found = [entry for number, file in enumerate(self.files) for entry in _entries(number, file.path)]
        names = Names([name for name, _ in found])
        table = np.array([entry for _, entry in found], _TAR_ENTRY)
        arrays = {"of": np.frombuffer(of, np.uint8), "text": names.text, "ends": names.ends, "table": table}
        try:
            write_atomically(index, lambda file: np.savez(file, **arrays))
        except UserError as error:
            logger.info("where each file begins is not kept, and found anew at each start: %s", error)
        return names, table


_TAR_ENTRY = np.dtype([("archive", "i8"), ("start", "i8"), ("size", "i8"), ("number", "i8")])
_FORM = 2  # of what is kept: an older one knows no links

_Line = tuple[int, int, int, int]  # of the table


def _entries(number: int, path: Path) -> list[tuple[str, _Line]]:
    """The files of a tar archive."""
    found: dict[str, _Line | str] = {}
    try:
        with path.open("rb") as file:
            for name, place in _members(number, file, 0, path.stat().st_size):
                if name in found:
                    raise UserError(
                        f"'{printable(path)}' holds '{printable(name)}' twice; make it again with one of each name"
                    )
                found[name] = place
    except UserError:
        raise
    except OSError as error:
        raise cannot_read(path, error) from error
    except Exception as error:  # what is wrong in an archive may raise anything
        raise UserError(
            f"'{printable(path)}' is not a tar archive, or is compressed, truncated or damaged: {printable(error)}"
        ) from error
    nowhere = (number, 0, -1, -1)
    return [(name, _followed(place, found) or nowhere) for name, place in found.items()]


def _followed(place: _Line | str, found: dict[str, _Line | str]) -> _Line | None:
    """Where the file lies that is there or that a link there leads to; None where it leads to none."""
    passed = set()
    while isinstance(place, str) and place not in passed:
        passed.add(place)
        place = found.get(place, "")
    return None if isinstance(place, str) else place


def _members(number: int, file: BinaryIO, start: int, end: int, folder: str = "") -> Iterator[tuple[str, _Line | str]]:
    """Of the archive at these bytes each file's name and place, or the name that a link leads to.

    An archive in it is a folder of its name, as in ImageNet's own archive.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while archive.offset < end and (member := archive.next()) is not None:
            archive.members = []  # which it would keep
            name, first = folder + member.name.removeprefix("./"), member.offset_data
            if member.islnk() or member.issym():
                beside = os.path.dirname(member.name) if member.issym() else ""
                target = folder + posixpath.normpath(posixpath.join(beside, member.linkname))
                if target != name:  # else a file that was given to tar twice
                    yield name, target
            elif not member.isreg():
                continue
            elif first + member.size > end or member.issparse():
                raise tarfile.ReadError(f"'{name}' " + ("is sparse" if member.issparse() else "is cut off"))
            elif name.endswith(".tar") and not os.path.basename(name).startswith("."):
                yield from _members(number, file, first, first + member.size, name.removesuffix(".tar") + "/")
            else:
                label = -1
                if name.endswith(".cls"):
                    label = _label(archive.extractfile(member).read(), name)
                yield name, (number, first, member.size, label)
        _check_end(file, archive.offset, end)


def _check_end(file: BinaryIO, start: int, end: int) -> None:
    """That an archive ends, behind its last file, by zeros and nothing else."""
    file.seek(start)
    mark = file.read(min(tarfile.BLOCKSIZE, max(0, end - start)))
    if any(mark):
        raise tarfile.ReadError(f"what lies at byte {start:,} is no file's header")
    if len(mark) < tarfile.BLOCKSIZE:
        raise UserError(
            f"'{printable(file.name)}' stops at byte {end:,} without the zeros of an archive's end, as a download that "
            "was cut off does; get it or make it again"
        )
    while file.tell() < end:
        place, data = file.tell(), file.read(min(_PIECE, end - file.tell()))
        if data.strip(b"\0"):
            raise UserError(
                f"'{printable(file.name)}' goes on behind its end, from byte {place:,}, as archives do that were put "
                "one behind the other; keep them in files of their own (NAME-train-0.tar, NAME-train-1.tar), or make "
                "one archive of what they hold"
            )


def _label(data: bytes, name: str) -> int:
    text = data.decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise tarfile.ReadError(f"'{name}' holds '{text[:20]}', not a label from 0 on")
    return int(text)


def _machine_memory() -> float:
    """Bytes; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
