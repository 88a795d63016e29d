"""What a file of weights is, seen from its first bytes, and what it holds.  Nothing pickled is run."""

import codecs
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from vmamba.errors import UserError
from vmamba.text import printable

_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what files of torch.save begin with that are no zip archive
_BEGINNINGS = {  # of what is taken for a checkpoint by mistake
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself; fetch that with 'git lfs pull'",
    b"\x1f\x8b": "is compressed by gzip; unpack it and give what is in it",
    b"BZh": "is compressed by bzip2; unpack it and give what is in it",
    b"\xfd7zXZ": "is compressed by xz; unpack it and give what is in it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it and give what is in it",
    b"7z\xbc\xaf": "is a 7z archive; unpack it and give what is in it",
    b"\x93NUMPY": "is an array of NumPy; save the weights with torch.save(state_dict, path)",
    b"\x89HDF": "is an HDF5 file; save the weights with torch.save(state_dict, path)",
}
_RUNS = "vmamba.load_program(path) runs it"


class Fields(dict):
    """A pickled object whose attributes are read as a mapping."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


def mapping(*factory: object) -> dict:
    """A pickled defaultdict, without what makes its defaults."""
    return {}


class NumberKind:
    """A pickled dtype of NumPy."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def number(kind: NumberKind, data: bytes = b"") -> bool | int | float | None:
    """A pickled number of NumPy, as Python's; None for what is no number."""
    if re.fullmatch("[biuf][1-8]", kind.code) is None:
        return None
    return np.frombuffer(data, np.dtype(kind.order.replace("|", "=") + kind.code), 1).item()


class Ignored:
    """Stands in for a pickled object that says nothing here: takes what is pickled of it and keeps nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def path_in(*parts: str) -> str:
    """A pickled path, as text."""
    return str(PurePosixPath(*parts))


# What is pickled in such files beside tensors and plain values: the config of the released ones and the arguments of
# timm's and DeiT's, read as mappings, and what trainers log, not read at all.
PLAIN = "plain.pth"  # in the folder of a state in shares: all but the tensors
PICKLED = [
    (OrderedDict, "yacs.config.CfgNode"),
    (Fields, "argparse.Namespace"),
    (Fields, "types.SimpleNamespace"),
    *(
        (path_in, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    (mapping, "collections.defaultdict"),
    *((kind, f"builtins.{kind.__name__}") for kind in (bool, dict, float, int, list, str, tuple)),  # what those make
    *((Ignored, f"datetime.{name}") for name in ("datetime", "date", "time", "timedelta", "timezone")),
    (Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (Ignored, "builtins.getattr"),  # of its methods, which it pickles too; nothing is looked up
    (Ignored, "numpy.ndarray"),
    (NumberKind, "numpy.dtype"),
    *(
        (what, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, what in {"_reconstruct": Ignored, "scalar": number}.items()
    ),
]


def as_one_file(folder: str | Path) -> str:
    """What to do with a state in shares (`vmamba.runtime.shares`) where a file is needed."""
    return (
        f"'{printable(folder)}' is a state in shares; make it a file first: python analyze/one_file.py "
        f"{printable(folder)} --output all.pth"
    )


def read_file(path: str | Path) -> Any:
    """What the file holds, tensors on the CPU: a file of torch.save, or safetensors, whatever its name.

    Nothing pickled but tensors, plain Python values and `PICKLED` is unpacked.
    Raises UserError, naming the file and what it is, when it is missing, damaged or anything else.
    """
    path = Path(path)
    try:
        if path.is_dir():
            if (path / PLAIN).is_file():
                raise UserError(as_one_file(path))
            raise UserError(f"checkpoint '{path}' is a folder; give the path of a file")
        if not path.is_file():
            raise UserError(f"there is no checkpoint '{printable(path)}'; check the path")
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    other = _something_else(path, start)
    if other:
        raise UserError(f"'{path}' {other}")
    try:
        if _is_safetensors(start):
            return _safetensors(path)
        with path.open("rb") as file, torch.serialization.safe_globals(PICKLED):  # by a name torch.load would guess
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"'{path}' {_why_not_unpickled(path, start, error)}") from error
    except Exception as error:  # bytes that are not a checkpoint fail in as many ways as there are bytes
        raise UserError(f"'{path}' is truncated or not a checkpoint{_reason(error)}") from error


def _safetensors(path: Path) -> dict[str, Any]:
    """Its tensors by name; where it tells of their model (`vmamba.export`), they under "model" beside that."""
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    told = description(about["vmamba"], path) if "vmamba" in about else {}
    return {**told, "model": tensors} if told else tensors


def description(text: str, path: Path) -> dict[str, Any]:
    """What a file of `vmamba.export` tells of its model, as JSON: of `config`, `classes` and `images` those there are.

    Raises UserError, naming the file, where they are not of the form that `vmamba.export` writes.
    """
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise damaged_description(path, f"it is {text!r:.60}, no mapping in JSON")
    for name, (fits, expected) in _DESCRIPTION.items():
        if name in told and not fits(told[name]):
            raise damaged_description(path, f"{name} is {told[name]!r:.60}, no {expected}")
    return told


def damaged_description(path: Path, what: str) -> UserError:
    return UserError(f"what '{printable(path)}' tells of its model is damaged ({what}); export the model again")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_sizes(value: Any) -> bool:
    """Of four sizes the least and the most, None where there is no most."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(bounds, list) and len(bounds) == 2 for bounds in value)
        and all(type(least) is int and (most is None or type(most) is int) for least, most in value)
    )


_DESCRIPTION = {
    "config": (lambda value: isinstance(value, dict), "mapping"),
    "classes": (_are_names, "list of names"),
    "images": (_are_sizes, "list of four [least, most]"),
}


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= 100_000_000


def _something_else(path: Path, start: bytes) -> str:
    """What the file is and what to do, where it is nothing to load weights from; else ""."""
    if not start:
        return "is empty; fetch it again"
    if _is_onnx(start):
        return f"is an ONNX model, a program for onnxruntime and no file of weights; {_RUNS}"
    start = _without_mark(start)
    for beginning, sentence in _BEGINNINGS.items():
        if start.startswith(beginning):
            return sentence
    if not start.strip(b"\0"):
        return f"begins with {len(start)} zeros, as files do whose writing broke off; fetch it again"
    if start[257:262] == b"ustar":
        return "is a tar archive; unpack it and give what is in it"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, as servers send instead of a file; download the file itself"
    if text.startswith((b"{", b"[")):
        return _json(path)
    if start.startswith(b"PK\x03\x04"):
        return _archive(path)
    if _protocol(start) and _LEGACY not in start[:32]:
        return (
            "was written by pickle and not by torch.save, and reading it would run its code; read it where you trust "
            "it and save it with torch.save(state_dict, path)"
        )
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"is a text file ({start[:30].decode()!r}); give a file of weights"
    return ""


def program_format(path: Path) -> str:
    """What of `vmamba.export`'s formats a file is that holds a program: "onnx", "torch", "aoti"; "" for another file.

    Raises OSError, or ValueError for a path with a zero byte, where it cannot be read.
    """
    with path.open("rb") as file:
        if _is_onnx(file.read(3)):
            return "onnx"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return ""
    if any("data/aotinductor/" in name for name in names):
        return "aoti"
    return "torch" if _of_programs(names) else ""


def _is_onnx(start: bytes) -> bool:
    """By the version of the form and who wrote it, in protobuf."""
    return start[:1] == b"\x08" and start[2:3] == b"\x12"


def _of_programs(names: Sequence[str]) -> bool:
    """Whether an archive of these files is of torch.export or AOTInductor; PyTorch 2.6 writes the second of the two."""
    return any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names)


def _without_mark(start: bytes) -> bytes:
    """The first bytes, of text without the mark of its encoding and in UTF-8."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return start.decode("utf-16", "ignore").encode()
    return start.removeprefix(codecs.BOM_UTF8)


def _json(path: Path) -> str:
    try:
        parts = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        parts = []
    if not parts:
        return "is JSON text, which holds no weights; give the file of weights beside it"
    return f"is the index of weights in {len(parts)} files ({parts[0]}, ...); save them as one file and give that"


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
            if "constants.pkl" in names:
                return "is a program of TorchScript; save its weights with torch.save(program.state_dict(), path)"
            if _of_programs(names):
                return f"is a program of PyTorch and no file of weights; {_RUNS}"
            if "data.pkl" not in names:
                return "is an archive without a checkpoint of torch.save; if one lies in it, unpack it and give that"
            for entry in archive.infolist():
                if entry.CRC:  # torch.save writes 0 where it is told to leave the sums out
                    _read_to_its_end(archive, entry)
    except Exception as error:  # damaged archives fail in many ways, by names that are no text for one
        return f"is truncated or damaged ({error}); fetch it again"
    return ""


def _read_to_its_end(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Raises BadZipFile where its bytes are not those that were saved, of which torch.load takes no notice."""
    with archive.open(entry) as file:
        while file.read(1 << 20):
            pass


def _reason(error: Exception) -> str:
    """What PyTorch says in brackets, but for advice to let the file run its code."""
    line = str(error).strip().partition("\n")[0]
    return f" ({line})" if line and not re.search("weights[ _]only", line, re.I) else ""


def _why_not_unpickled(path: Path, start: bytes, error: Exception) -> str:
    reason = str(error)
    if not (start.startswith(b"PK\x03\x04") or _LEGACY in start[:32]):
        return "is truncated or not a checkpoint"
    protocol = _protocol(_head_of_pickle(path, start))
    if protocol > 2:
        return (
            f"was saved with pickle's protocol {protocol}, which cannot be read without running code; save it again "
            f"with torch.save(content, path)"
        )
    found = re.search(r"GLOBAL ([\w.]+)", reason)
    if found or "unsupported" in reason.lower():
        return (
            f"holds pickled objects{f' ({found[1]})' if found else ''} besides tensors and plain values, and loading "
            f"those would run their code; save its weights alone (a state dict) and load that"
        )
    return f"is damaged{_reason(error)}"


def _head_of_pickle(path: Path, start: bytes) -> bytes:
    """The first bytes of the pickle in a file of torch.save."""
    if not start.startswith(b"PK\x03\x04"):
        return start
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        with archive.open(name) as file:
            return file.read(2)


def _protocol(start: bytes) -> int:
    """Of the pickle that begins so; 0 where none does."""
    is_pickle = start[:1] == b"\x80" and len(start) > 1 and start[1] <= pickle.HIGHEST_PROTOCOL
    return start[1] if is_pickle else 0
