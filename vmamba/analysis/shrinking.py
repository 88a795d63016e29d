"""Folders of images copied with the large ones made smaller."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vmamba.analysis.dataloading import cores
from vmamba.data.folders import image_files, what_is
from vmamba.data.images import UnreadableImage, decode, open_image, reading
from vmamba.errors import UserError
from vmamba.files import check_writable, make_folder, write_atomically, write_text
from vmamba.text import counted, printable, some

RECORD = "shrunk.json"
_AT_ONCE = 32  # images that a process is given


def shrink(
    folder: str, *, output: str = "output/shrunk", side: int = 320, quality: int = 90, workers: int | None = None
) -> dict[str, Any]:
    """Copy the images below `folder` to `output`, those of a larger short side as JPEGs of that short side, under the
    same names; a file that is no JPEG becomes NAME.jpg behind its own suffix, unless it is small and copied as it is.

    What is whole in `output` is kept, so a copy that was stopped goes on; whole is a JPEG that begins and ends as one
    and has the size it should have, or a copy of as many bytes.  Images that cannot be read are left out and named.

    Args:
        side: pixels; resized as Pillow does, bicubic.
        quality: of JPEG, 1 to 100.
        workers: processes; None: one a core.

    Returns what it writes into `output`/shrunk.json: the settings, how many were made, copied and kept, the bytes
    before and after, the unreadable.  Raises UserError where a folder cannot be read or written, where one lies in the
    other, and where `output` holds a copy made with other settings.
    """
    source, target = Path(folder), Path(output)
    check_writable(target / RECORD)
    if what_is(source) != "folder":
        raise UserError(f"'{printable(source)}' is no folder; name the one that holds the images")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"'{printable(target)}' and '{printable(source)}' lie in each other; choose another --output")
    settings = {"folder": str(inner), "side": side, "quality": quality}
    _check_settings(target, settings)
    files = image_files(source)
    if not files:
        raise UserError(f"'{printable(source)}' holds no image")
    write_text(target / RECORD, json.dumps(settings | {"finished": False}, indent=1))
    counts = dict.fromkeys(("made", "copied", "kept"), 0)
    sizes, unreadable = [0, 0], []
    for what, before, after in tqdm(
        _each(files, source, target, side, quality, workers), total=len(files), unit="image"
    ):
        if what not in counts:
            unreadable.append(what)
            continue
        counts[what] += 1
        sizes = [sizes[0] + before, sizes[1] + after]
    result = settings | {"finished": True, **counts, "bytes_before": sizes[0], "bytes_after": sizes[1]}
    result["unreadable"] = unreadable
    write_text(target / RECORD, json.dumps(result, indent=1))
    print(
        f"{counted(len(files) - len(unreadable), 'image')} in {output}: {counts['made']:,} made smaller, "
        f"{counts['copied']:,} copied, {counts['kept']:,} kept; {sizes[0] / 1e9:.3g} GB became {sizes[1] / 1e9:.3g}"
    )
    if unreadable:
        print(f"left out, {counted(len(unreadable), 'image')} that cannot be read: {some(unreadable)}")
    return result


def _check_settings(target: Path, settings: dict[str, Any]) -> None:
    try:
        found = json.loads((target / RECORD).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"'{printable(target / RECORD)}' cannot be read ({error}); choose an empty --output") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"'{printable(target)}' holds a copy with {name} {found.get(name)}, not {value}; choose another "
                "--output"
            )


def _each(
    files: list[str], source: Path, target: Path, side: int, quality: int, workers: int | None
) -> Iterator[tuple[str, int, int]]:
    """What became of each file: made, copied, kept, or a sentence why it cannot be read; its bytes before and after."""
    one = partial(_shrink_one, source=source, target=target, side=side, quality=quality)
    workers = workers or cores()
    if workers == 1:
        yield from map(one, files)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(one, files, chunksize=_AT_ONCE)


def _shrink_one(path: str, source: Path, target: Path, side: int, quality: int) -> tuple[str, int, int]:
    place = target / Path(path).relative_to(source)
    try:
        with reading(path):
            data = Path(path).read_bytes()
            with open_image(data) as image:
                (width, height), kind = image.size, image.format
        small = min(width, height) <= side
        scale = side / min(width, height)
        size = max(side, round(width * scale)), max(side, round(height * scale))
        if small:
            decode(data, 3, path)  # which fails where the file is broken off
        elif kind != "JPEG":
            place = place.with_name(f"{place.name}.jpg")
            if Path(path).with_name(place.name).exists():
                raise UserError(
                    f"'{printable(path)}' would become '{printable(place.name)}', a name that lies beside it; "
                    "rename one"
                )
        there = place.read_bytes() if place.is_file() else b""
        if len(there) == len(data) if small else _is_jpeg_of(there, size):
            return "kept", len(data), len(there)
        made = data if small else _jpeg(decode(data, 3, path).resize(size, Image.Resampling.BICUBIC), quality)
    except UnreadableImage as error:
        return str(error), 0, 0
    make_folder(place.parent)
    write_atomically(place, lambda file: file.write(made))
    return "copied" if small else "made", len(data), len(made)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _is_jpeg_of(data: bytes, size: tuple[int, int]) -> bool:
    """Whether it begins and ends as a JPEG, of that size."""
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return False
    try:
        with open_image(data) as image:
            return image.size == size
    except Exception:  # whatever a damaged header makes Pillow raise
        return False
