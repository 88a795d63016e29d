"""Files of annotations in COCO's form: what they hold, checked once, so that what is wrong is one sentence.

A box is four numbers x, y, width, height; a mask is polygons, or run lengths; both in pixels of the file's image.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as run_lengths

from vmamba.errors import UserError
from vmamba.files import read_text
from vmamba.text import printable, some

_LARGEST = 1e6  # side or coordinate in pixels; a polygon takes memory by its length


@dataclass(frozen=True)
class Instance:
    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int  # from 0
    mask: Any  # polygons or run lengths, as in the file

    def bitmap(self, height: int, width: int) -> np.ndarray:
        """(H, W) uint8 of 0 and 1."""
        return run_lengths.decode(as_run_lengths(self.mask, height, width))


@dataclass(frozen=True)
class ImageEntry:
    id: int
    file: str
    height: int
    width: int
    instances: tuple[Instance, ...]  # of crowds none, nor of boxes without area or outside of the image


@dataclass(frozen=True)
class Annotations:
    categories: tuple[tuple[int, str], ...]  # (number in the file, name), by number: of label 0, 1, ...
    images: tuple[ImageEntry, ...]
    left_out: Mapping[str, int]  # why annotations are in no image, and how many


def as_run_lengths(mask: Any, height: int, width: int) -> Any:
    """COCO's compressed run lengths of a mask of any of its three forms."""
    if isinstance(mask, list):
        return run_lengths.merge(run_lengths.frPyObjects(mask, height, width))
    if isinstance(mask["counts"], list):
        return run_lengths.frPyObjects(mask, height, width)
    return mask


def read_annotations(path: Path) -> tuple[Annotations, dict[str, Any]]:
    """What a file of COCO's form holds, and its content.  Raises UserError, naming file and place."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{printable(path)}' is truncated or no JSON ({error}); fetch it again") from error
    return parse(content, path), content


def parse(content: Any, path: Path) -> Annotations:
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or not isinstance(content.get(part), list):
            raise UserError(
                f"'{printable(path)}' has no list '{part}', so it is not of COCO's form; that has images, annotations "
                f"and categories"
            )
    reader = _Reader(path)
    categories = reader.by_number(content["categories"], "category")
    if not categories:
        raise reader.wrong("it has no categories, so nothing to tell apart")
    label_of = {number: label for label, number in enumerate(sorted(categories))}
    entries = reader.by_number(content["images"], "image")
    images = {
        number: ImageEntry(
            number,
            reader.text(each, "file_name", f"image {number}"),
            reader.side(each, "height", number),
            reader.side(each, "width", number),
            (),
        )
        for number, each in entries.items()
    }
    instances, left_out = defaultdict(list), Counter()
    for which, each in reader.by_number(content["annotations"], "annotation").items():
        number = reader.number(each, "image_id", f"annotation {which}")
        if number not in images:
            raise reader.wrong(f"annotation {which} is of image {number}, which is not listed")
        reason, instance = reader.instance(each, which, label_of, images[number])
        if reason:
            left_out[reason] += 1
        else:
            instances[number].append(instance)
    return Annotations(
        tuple((number, str(categories[number].get("name", ""))) for number in label_of),
        tuple(replace(each, instances=tuple(instances[each.id])) for each in images.values()),
        left_out,
    )


class _Reader:
    """Reads values of a file's entries; what is not as it should be is a UserError that names the entry."""

    def __init__(self, path: Path):
        self.path = path

    def wrong(self, what: str) -> UserError:
        return UserError(f"'{printable(self.path)}': {printable(what)}")

    def by_number(self, entries: list, what: str) -> dict[int, Mapping]:
        found: dict[int, Mapping] = {}
        for each in entries:
            number = self.number(each, "id", what)
            if number in found:
                raise self.wrong(f"{what} {number} is listed twice; give each a number of its own")
            found[number] = each
        return found

    def number(self, entry: Any, name: str, what: str) -> int:
        value = entry.get(name) if isinstance(entry, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(f"{what} has {name} {value!r:.60}; expected a whole number")
        return value

    def text(self, entry: Mapping, name: str, what: str) -> str:
        value = entry.get(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(f"{what} has {name} {value!r:.60}; expected text")
        return value

    def side(self, entry: Mapping, name: str, image: int) -> int:
        value = self.number(entry, name, f"image {image}")
        if not 1 <= value <= _LARGEST:
            raise self.wrong(f"image {image} has {name} {value:.6g}; expected 1 to {_LARGEST:.0f}")
        return value

    def instance(
        self, entry: Mapping, which: int, label_of: Mapping[int, int], image: ImageEntry
    ) -> tuple[str, Instance | None]:
        """An annotation as an instance, or the reason why it is left out."""
        category = self.number(entry, "category_id", f"annotation {which}")
        if category not in label_of:
            known = some(list(label_of))
            raise self.wrong(f"annotation {which} has category {category}, which is not listed; there are {known}")
        box, area = entry.get("bbox"), entry.get("area", 1)
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise self.wrong(
                f"annotation {which} has bbox {box!r:.60}; expected four finite numbers x, y, width, height in pixels"
            )
        if not _is_number(area, _LARGEST**2):
            raise self.wrong(f"annotation {which} has area {area!r:.60}; expected a finite number, or leave it out")
        if entry.get("iscrowd", 0) not in (0, 1):
            raise self.wrong(f"annotation {which} has iscrowd {entry['iscrowd']!r:.60}; expected 0 or 1")
        x, y, width, height = map(float, box)
        mask = entry.get("segmentation")
        # Evaluation reads those too that are left out of training.
        self._check_mask(mask, which, image)
        if entry.get("iscrowd"):
            return "crowds", None
        if width < 1 or height < 1 or area <= 0:
            return "boxes without area", None
        inside_x = min(x + width, image.width) - max(x, 0)
        inside_y = min(y + height, image.height) - max(y, 0)
        if inside_x <= 0 or inside_y <= 0:
            return "boxes outside of their image", None
        if _is_empty(mask, image):
            return "masks without a pixel of their image", None
        return "", Instance((x, y, x + width, y + height), label_of[category], mask)

    def _check_mask(self, mask: Any, which: int, image: ImageEntry) -> None:
        if not mask:
            raise self.wrong(
                f"annotation {which} has no mask (segmentation is {mask!r}), and Mask R-CNN learns and is judged by "
                f"boxes and masks; add polygons or run lengths"
            )
        size = [image.height, image.width]
        if isinstance(mask, Mapping):
            if mask.get("size") != size:
                raise self.wrong(
                    f"annotation {which} has a mask of size {mask.get('size')!r:.60} (height, width), and its image is "
                    f"{size}"
                )
            pixels = _pixels(mask.get("counts"))
            if pixels is None:
                raise self.wrong(f"annotation {which} has run lengths that are damaged; write its mask again")
            if pixels != size[0] * size[1]:
                raise self.wrong(
                    f"annotation {which} has run lengths of {pixels} pixels in an image of {size[0] * size[1]}"
                )
        elif not isinstance(mask, list) or not all(map(_is_polygon, mask)):
            raise self.wrong(
                f"annotation {which} has segmentation {mask!r:.60}; expected polygons of three points or more, x and y "
                f"in turn, or run lengths"
            )


def _is_empty(mask: Any, image: ImageEntry) -> bool:
    """Run lengths of background alone, or polygons that lie beside the image."""
    if isinstance(mask, Mapping):
        counts = mask["counts"]
        return not any((_uncompressed(counts) if isinstance(counts, str) else counts)[1::2])
    x, y = ([value for polygon in mask for value in polygon[start::2]] for start in (0, 1))
    return max(x) <= 0 or max(y) <= 0 or min(x) >= image.width or min(y) >= image.height


def _is_number(value: Any, largest: float = _LARGEST) -> bool:
    return type(value) in (int, float) and -largest <= value <= largest


def _is_polygon(values: Any) -> bool:
    return isinstance(values, list) and len(values) >= 6 and len(values) % 2 == 0 and all(map(_is_number, values))


def _pixels(counts: Any) -> int | None:
    """How many pixels run lengths have, compressed ones or a list; None for what are none."""
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        return None
    return sum(counts)


def _uncompressed(text: str) -> list[int] | None:
    """COCO's text of run lengths: five bits a character, the lowest first, from the fourth on differences to the
    one before the last."""
    counts: list[int] = []
    number = bits = 0
    for character in text:
        value = ord(character) - 48
        if not 0 <= value < 64:
            return None
        number |= (value & 31) << bits
        bits += 5
        if value & 32:
            continue
        if value & 16:
            number -= 1 << bits
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = bits = 0
    return None if bits else counts
