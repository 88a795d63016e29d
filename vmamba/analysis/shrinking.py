"""Folders of images copied with the large ones made smaller."""

import io
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vmamba.analysis.dataloading import cores
from vmamba.data.folders import LeftOut, image_files, what_is
from vmamba.data.images import UnreadableImage, decode, reading
from vmamba.errors import UserError
from vmamba.files import cannot_write, check_writable, make_folder, write_atomically, write_text
from vmamba.text import counted, printable, some

RECORD, SUMS = "shrunk.json", "shrunk.jsonl"
_AT_ONCE = 32  # images that a thread is given
_MOST = 65535  # pixels of a JPEG's side

_Sums = tuple[int, int]  # CRC-32 of an image's file, and of its copy


@dataclass(frozen=True)
class _Copied:
    """What became of an image."""

    name: str  # below both folders
    how: str  # made, copied, kept; else a sentence why it is left out
    sums: _Sums = (0, 0)
    before: int = 0  # bytes
    after: int = 0


def shrink(
    folder: str, *, output: str = "output/shrunk", side: int = 320, quality: int = 90, workers: int | None = None
) -> dict[str, Any]:
    """Copy the images below `folder` to `output` under the same names, those of a larger short side as JPEGs of that
    short side, whatever their names' suffixes say: images are told by what they hold.

    A copy that was stopped goes on, and one that is there is looked over: sums in `output`/shrunk.jsonl tell whether an
    image and its copy are what they were.  What is not is made again; a copy whose image is gone is removed.  What is
    no image of gray or RGB is not copied, and named; so are images that cannot be read.

    Args:
        side: pixels; resized as Pillow does, bicubic.
        quality: of JPEG, 1 to 100.
        workers: threads; None: one a core.

    Returns what it writes into `output`/shrunk.json: the settings, how many were made, copied, kept and removed, the
    bytes before and after, what is left out.  Raises UserError where a folder cannot be read or written, where one lies
    in the other, and where `output` holds other files, or a copy made with other settings.
    """
    source, target = Path(folder), Path(output)
    check_writable(target / RECORD)
    if what_is(source) != "folder":
        raise UserError(f"'{printable(source)}' is no folder; name the one that holds the images")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"'{printable(target)}' and '{printable(source)}' lie in each other; choose another --output")
    settings = {"folder": str(inner), "side": side, "quality": quality, "names": "kept"}  # once they were not
    _check_settings(target, settings)
    left_out = LeftOut()
    names = [os.path.relpath(path, source) for path in image_files(source, left_out)]
    if not names:
        raise UserError(f"'{printable(source)}' holds no image")
    write_text(target / RECORD, json.dumps(settings | {"finished": False}, indent=1))
    known = _read_sums(target / SUMS)
    done = _copy(names, source, target, side, quality, workers, known)
    there = {each.name: each.sums for each in done if each.how in _HOW}
    removed = [name for name in known if name not in there and (target / name).is_file()]
    for name in removed:
        _remove(target / name)
    _write_sums(target / SUMS, there)
    result = settings | {
        "finished": True,
        **{how: sum(each.how == how for each in done) for how in _HOW},
        "removed": len(removed),
        "bytes_before": sum(each.before for each in done),
        "bytes_after": sum(each.after for each in done),
        "unreadable": [each.how for each in done if each.how not in _HOW],
        "left_out": str(left_out),
    }
    write_text(target / RECORD, json.dumps(result, indent=1))
    print(_told(result, len(there), output))
    return result


_HOW = ("made", "copied", "kept")


def _told(result: dict[str, Any], images: int, output: str) -> str:
    before, after = (result[key] / 1e9 for key in ("bytes_before", "bytes_after"))
    lines = [
        f"{counted(images, 'image')} in {output}: {result['made']:,} made smaller, {result['copied']:,} copied, "
        f"{result['kept']:,} kept; {before:.3g} GB became {after:.3g}"
    ]
    if result["removed"]:
        lines.append(f"removed, {counted(result['removed'], 'copy', 'copies')} of what is no longer there")
    if unreadable := result["unreadable"]:
        lines.append(f"left out, {counted(len(unreadable), 'image')} that cannot be copied: {some(unreadable)}")
    if result["left_out"]:
        lines.append(f"left out, since it is no image of gray or RGB by its name: {result['left_out']}")
    return "\n".join(lines)


def _check_settings(target: Path, settings: dict[str, Any]) -> None:
    """That `target` is empty, or holds a copy made with these."""
    others = sorted(name for name in os.listdir(target) if not name.startswith("."))
    if others and RECORD not in others:
        raise UserError(
            f"'{printable(target)}' holds files that are no copy made here ({some(others)}), which would be written "
            "over; choose an empty --output"
        )
    try:
        found = json.loads((target / RECORD).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"'{printable(target / RECORD)}' cannot be read ({error}); choose an empty --output") from error
    if not isinstance(found, dict):
        raise UserError(f"'{printable(target / RECORD)}' is no record of a copy; choose an empty --output")
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"'{printable(target)}' holds a copy with {name} {found.get(name)}, not {value}; choose another "
                "--output"
            )


# ------------------------------------------------------------------------------------------------ sums


def _read_sums(path: Path) -> dict[str, _Sums]:
    """By name.  A line that is not whole, as one who was killed leaves it, tells nothing: that image is made again."""
    found: dict[str, _Sums] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            name, *sums = json.loads(line)
            of_image, of_copy = map(int, sums)
        except (ValueError, TypeError):
            continue
        if isinstance(name, str) and not os.path.isabs(name) and ".." not in Path(name).parts:
            found[name] = of_image, of_copy
    return found


def _line(name: str, sums: _Sums) -> str:
    return json.dumps([name, *sums]) + "\n"


def _write_sums(path: Path, known: dict[str, _Sums]) -> None:
    write_text(path, "".join(_line(*each) for each in sorted(known.items())))


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


# ------------------------------------------------------------------------------------------------ images


def _copy(
    names: list[str],
    source: Path,
    target: Path,
    side: int,
    quality: int,
    workers: int | None,
    known: dict[str, _Sums],
) -> list[_Copied]:
    one = partial(_copy_one, source=source, target=target, side=side, quality=quality, known=known)
    _write_sums(target / SUMS, known)
    done = []
    try:
        with (target / SUMS).open("a", buffering=1) as sums, closing(_each(one, names, workers or cores())) as each:
            for copied in tqdm(each, total=len(names), unit="image"):
                done.append(copied)
                if copied.how in ("made", "copied"):
                    sums.write(_line(copied.name, copied.sums))
    except OSError as error:
        raise cannot_write(target / SUMS, error) from error
    return done


def _each(one: partial, names: list[str], workers: int) -> Iterator[_Copied]:
    """By threads: decoding, resizing, encoding and the disk let each other go on."""
    some_names = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
    pool = ThreadPoolExecutor(workers)
    try:
        for copied in pool.map(lambda these: [*map(one, these)], some_names):
            yield from copied
    finally:
        pool.shutdown(cancel_futures=True)


def _copy_one(name: str, source: Path, target: Path, side: int, quality: int, known: dict[str, _Sums]) -> _Copied:
    path, place = source / name, target / name
    try:
        with reading(path):
            data = path.read_bytes()
        there = place.read_bytes() if place.is_file() else b""
        sums = zlib.crc32(data), zlib.crc32(there)
        if known.get(name) == sums:
            return _Copied(name, "kept", sums, len(data), len(there))
        how, made = _smaller(data, path, side, quality)
    except UnreadableImage as error:
        return _Copied(name, str(error))
    make_folder(place.parent)
    write_atomically(place, lambda file: file.write(made))
    return _Copied(name, how, (zlib.crc32(data), zlib.crc32(made)), len(data), len(made))


def _smaller(data: bytes, path: Path, side: int, quality: int) -> tuple[str, bytes]:
    """ "made" and the file of the smaller image, or "copied" and `data`.  Raises UnreadableImage."""
    image = decode(data, 3, path)  # small ones too: it fails where the file is broken off
    width, height = image.size
    if min(width, height) <= side:
        return "copied", data
    scale = side / min(width, height)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    if max(size) > _MOST:
        raise UnreadableImage(
            f"cannot make '{printable(path)}' smaller: it would have {size[0]:,} x {size[1]:,} pixels, and a JPEG has "
            f"at most {_MOST:,} a side"
        )
    file = io.BytesIO()
    with reading(path):  # where memory is too small, for one
        image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return "made", file.getvalue()
