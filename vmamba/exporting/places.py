"""Whether a file may be written: over one of `vmamba.export`'s, not over another."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vmamba.errors import UserError
from vmamba.exporting.weights import ABOUT
from vmamba.files import check_replaces, check_writable
from vmamba.models.formats import program_format, read_file
from vmamba.runtime.checkpoint import is_there
from vmamba.text import printable


def check_place(path: Path) -> None:
    """Raises UserError where nothing can be written, or where the state of a run or a file of another program would be
    written over."""
    check_writable(path)
    if is_there(path):
        raise UserError(f"'{printable(path)}' is the state of a run, which would be lost; choose another file")
    check_replaces(path, _is_ours, "file of vmamba.export")


def _is_ours(path: Path) -> bool:
    """By what such files tell of their model."""
    format = program_format(path)
    if format == "onnx":
        import onnx

        return any(each.key == ABOUT for each in onnx.load(path, load_external_data=False).metadata_props)
    if format:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            told = [json.loads(archive.read(name)) for name in names if name.endswith("_metadata.json")]
        return any(name.endswith(f"extra/{ABOUT}") for name in names) or any(ABOUT in each for each in told)
    try:
        with safe_open(path, "pt") as file:
            return ABOUT in (file.metadata() or {})
    except SafetensorError:
        content = read_file(path)
        return isinstance(content, Mapping) and ABOUT in content
