"""Files in a zip archive, read by number: any data set's, by any number of processes."""

import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from vmamba.errors import UserError
from vmamba.files import cannot_read
from vmamba.text import counted, printable, some

logger = logging.getLogger("vmamba")

_ENTRY = np.dtype([("header", "i8"), ("packed", "u8"), ("size", "u8"), ("crc", "u4"), ("deflated", "?")])
_HEADER = struct.Struct("<4s22xHH")  # before a file's bytes: signature; lengths of its name and of what follows that
_PIECE = 2**24  # bytes read at once where everything is read


class Archive:
    """The files `names` of the zip archive at `path`, by their place in `names`.

    The archive's directory is read once, here: what is kept of it is a table of 29 bytes a file, which worker processes
    share (fork) or are given (spawn).  They share the open file too: reading at a place moves nobody else's.

    Raises UserError when the archive cannot be read, lacks one of the files, or holds one encrypted or compressed in a
    rare way.
    """

    def __init__(self, path: str | Path, names: Sequence[str]):
        self.path = Path(path)
        self._held: torch.Tensor | None = None  # the archive's bytes; a tensor, since PyTorch's workers share those
        try:
            self._file = self.path.open("rb", buffering=0)
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise cannot_read(self.path, error) from error
        self._table = self._read_directory(names)

    def __len__(self) -> int:
        return len(self._table)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def read(self, index: int) -> bytes:
        """The bytes of a file.  A damaged archive may make this raise any Exception (see `images.reading`)."""
        header, packed, size, checksum, deflated = self._table[index].item()
        signature, name_length, extra_length = _HEADER.unpack(self._read_at(header, _HEADER.size))
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile("the archive's directory names a place where no file begins")
        data = self._read_at(header + _HEADER.size + name_length + extra_length, packed)
        if deflated:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise zipfile.BadZipFile("its bytes are not those that the archive's checksum is of")
        return data

    def read_ahead(self, part: int, parts: int) -> None:
        """Read one of `parts` of the archive once, from its beginning to its end, and keep none of it: the processes of
        a machine together read it whole, since each will want files of anywhere.

        The system keeps what was read (its page cache) for all processes of the machine, as far as its memory goes, and
        drops it when memory is wanted.  Does nothing where the archive is larger than the machine's memory.
        """
        if self._size > _machine_memory():
            logger.info("'%s' is larger than the machine's memory and is not read ahead", printable(self.path))
            return
        logger.info("reading '%s' (%.1f GB) ahead, once", printable(self.path), self._size / 1e9)
        start, end = self._size * part // parts, self._size * (part + 1) // parts
        try:
            for place in range(start, end, _PIECE):
                self._read_at(place, min(_PIECE, end - place))
        except OSError as error:  # whoever wants the file that lies there will meet it
            logger.warning("stopped reading '%s' ahead: %s", printable(self.path), error.strerror)

    def hold(self) -> None:
        """Read the whole archive into this process's memory.  Raises UserError where that cannot be."""
        logger.info("reading '%s' (%.1f GB) into memory", printable(self.path), self._size / 1e9)
        try:
            held = torch.empty(self._size, dtype=torch.uint8)
            view, place = memoryview(held.numpy()), 0
            with self.path.open("rb", buffering=0) as file:
                while count := file.readinto(view[place : place + _PIECE]):
                    place += count
        except OSError as error:
            raise cannot_read(self.path, error) from error
        except (RuntimeError, MemoryError) as error:
            size = f"{self._size / 1e9:.1f} GB"
            raise UserError(
                f"'{printable(self.path)}' does not fit into memory ({size}); choose DATA.CACHE_MODE part"
            ) from error
        self._held = held

    def _read_directory(self, names: Sequence[str]) -> np.ndarray:
        """The table of `names`."""
        table = np.zeros(len(names), _ENTRY)
        try:
            with zipfile.ZipFile(self._file) as archive:
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

    def _read_at(self, place: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the end of the file."""
        if self._held is not None:
            return self._held[place : place + length].numpy().tobytes()
        if not hasattr(os, "pread"):  # Windows
            with self.path.open("rb", buffering=0) as file:
                file.seek(place)
                return file.read(length)
        if self._file is None:  # in a spawned process
            self._file = self.path.open("rb", buffering=0)
        return os.pread(self._file.fileno(), length, place)


def _machine_memory() -> float:
    """Bytes; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
