"""Weights from an address into torch hub's cache: resumed when they broke off, verified where a hash is known."""

import hashlib
import json
import logging
import re
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.files import held

logger = logging.getLogger("vmamba")
_TIMEOUT = 30  # seconds without an answer


def is_url(source: object) -> bool:
    return re.match(r"https?://", str(source)) is not None


def download(url: str, sha256: str | None = None) -> Path:
    """The file at `url`, in torch hub's `checkpoints` folder; one that is there already is not fetched again.

    What broke off stays as NAME.part, and the next call goes on from there if the file at `url` is still the same.
    Raises UserError, saying what to put where, when the address does not answer, when the file breaks off, and when
    its SHA-256 is not `sha256`.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(unquote(urlsplit(url).path)).name)
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists():
            logger.info(f"found {path}, downloaded earlier")
            return _checked(path, url, sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path.with_name(f"{path.name}.lock")):
            if not path.exists():  # another process may have been faster
                _fetch(url, part, path)
                _checked(part, url, sha256).rename(path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}; set TORCH_HOME to another folder") from error
    return path


def _fetch(url: str, part: Path, path: Path) -> None:
    """Complete `part`, as long as each try brings something; it stays where it holds anything."""
    part.touch()
    try:
        _complete(url, part, f"fetch it by other means and put it at '{path}'")
    except BaseException:
        if not part.stat().st_size:
            part.unlink()
        raise


def _complete(url: str, part: Path, remedy: str) -> None:
    while True:
        before = part.stat().st_size
        try:
            total = _transfer(url, part)
        except HTTPError as error:
            raise UserError(f"{url} answers {error.code} {error.reason}; {remedy}") from error
        except (URLError, HTTPException, OSError) as error:
            raise UserError(f"{url} cannot be downloaded ({getattr(error, 'reason', error)}); {remedy}") from error
        size = part.stat().st_size
        if total is None or size == total:
            return
        if size <= before:
            raise UserError(
                f"the download of {url} broke off after {size} of {total} bytes; try again to go on from there, or "
                f"{remedy}"
            )
        logger.info(f"the download broke off after {size} of {total} bytes; going on from there")


def _transfer(url: str, part: Path) -> int | None:
    """Append what one request brings to `part`; returns the size of the whole file, None where the server hides it."""
    start, origin = part.stat().st_size, _origin(part)
    headers = {"User-Agent": "vmamba"}
    if start and origin.get("url") == url:
        headers["Range"] = f"bytes={start}-"
        if origin.get("validator"):  # the server sends the whole file when it is another one by now
            headers["If-Range"] = origin["validator"]
    try:
        answer = urlopen(Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", "")) if error.code == 416 else None
        if whole and int(whole[1]) == start:
            return start
        if error.code == 416:  # longer than the file there: not a part of it
            part.open("wb").close()
            return _transfer(url, part)
        raise
    with answer:
        length = answer.headers.get("Content-Length")
        if answer.status != 206:
            start = 0
        total = start + int(length) if length else None
        validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if validator and validator.startswith("W/"):  # a weak one does not identify bytes
            validator = None
        _origin_file(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")
        logger.info(f"downloading {url} to {part}" + (f" from byte {start} on" if start else ""))
        with part.open("r+b") as file:
            file.truncate(start)
            file.seek(start)
            _copy(answer, file, start, total)
    return total


def _copy(answer: BinaryIO, file: BinaryIO, start: int, total: int | None) -> None:
    with tqdm(total=total, initial=start, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        try:
            while chunk := answer.read(2**20):
                file.write(chunk)
                bar.update(len(chunk))
        except (HTTPException, ConnectionError, TimeoutError) as error:
            logger.info(f"the connection ended: {error}")  # what came is kept, and its size tells what is missing


def _checked(path: Path, url: str, sha256: str | None) -> Path:
    """`path`, if it is what `url` should give."""
    other = _origin(path).get("url", url)
    if other != url:
        raise UserError(f"'{path}' was downloaded from {other} and not from {url}; move it and try again")
    if sha256 is not None:
        digest = _digest(path)
        if digest != sha256:
            raise UserError(
                f"'{path}' has SHA-256 {digest} and not {sha256}, so it is not {url}; delete it and try again"
            )
        logger.info(f"{path} has the SHA-256 expected")
    else:
        logger.info(f"no SHA-256 is known for {url}: what was sent is taken as it is")
    return path


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _origin_file(part: Path) -> Path:
    return part.with_name(f"{part.name.removesuffix('.part')}.origin.json")


def _origin(part: Path) -> dict:
    """Where a download came from, as it was noted beside it; nothing for a file that was put there by hand."""
    try:
        return json.loads(_origin_file(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
