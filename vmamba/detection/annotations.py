"""Files of annotations in COCO's form: what they hold, checked once, so that what is wrong is one sentence.

A box is four numbers x, y, width, height; a mask is polygons, or run lengths; both in pixels of the file's image.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as run_lengths

from vmamba.errors import UserError
from vmamba.files import read_text
from vmamba.text import printable, some


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
    except ValueError as error:
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
    categories = sorted(
        (reader.number(each, "id", "category"), str(each.get("name", ""))) for each in content["categories"]
    )
    label_of = {number: label for label, (number, _) in enumerate(categories)}
    entries = {reader.number(each, "id", "image"): each for each in content["images"]}
    instances, left_out = defaultdict(list), Counter()
    for each in content["annotations"]:
        which = reader.number(each, "id", "annotation")
        image = reader.number(each, "image_id", f"annotation {which}")
        if image not in entries:
            raise UserError(f"'{printable(path)}': annotation {which} is of image {image}, which is not listed")
        reason, instance = reader.instance(each, which, label_of, entries[image])
        if reason:
            left_out[reason] += 1
        else:
            instances[image].append(instance)
    images = tuple(
        ImageEntry(
            number,
            reader.text(each, "file_name", f"image {number}"),
            reader.side(each, "height", number),
            reader.side(each, "width", number),
            tuple(instances[number]),
        )
        for number, each in entries.items()
    )
    return Annotations(tuple(categories), images, left_out)


class _Reader:
    """Reads values of a file's entries; what is not as it should be is a UserError that names the entry."""

    def __init__(self, path: Path):
        self.path = path

    def wrong(self, what: str) -> UserError:
        return UserError(f"'{printable(self.path)}': {printable(what)}")

    def number(self, entry: Any, name: str, what: str) -> int:
        value = entry.get(name) if isinstance(entry, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(f"{what} has {name} {value!r}; expected a whole number")
        return value

    def text(self, entry: Mapping, name: str, what: str) -> str:
        value = entry.get(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(f"{what} has {name} {value!r}; expected text")
        return value

    def side(self, entry: Mapping, name: str, image: int) -> int:
        value = self.number(entry, name, f"image {image}")
        if value < 1:
            raise self.wrong(f"image {image} has {name} {value}; expected 1 or more")
        return value

    def instance(
        self, entry: Mapping, which: int, label_of: Mapping[int, int], image: Mapping
    ) -> tuple[str, Instance | None]:
        """An annotation as an instance, or the reason why it is left out."""
        category = self.number(entry, "category_id", f"annotation {which}")
        if category not in label_of:
            known = some(list(label_of))
            raise self.wrong(f"annotation {which} has category {category}, which is not listed; there are {known}")
        box = entry.get("bbox")
        if not _is_numbers(box, 4):
            raise self.wrong(
                f"annotation {which} has bbox {box!r:.60}; expected four finite numbers x, y, width, height"
            )
        if entry.get("iscrowd"):
            return "crowds", None
        x, y, width, height = map(float, box)
        inside_x = min(x + width, image["width"]) - max(x, 0)
        inside_y = min(y + height, image["height"]) - max(y, 0)
        if width < 1 or height < 1 or entry.get("area", 1) <= 0:
            return "boxes without area", None
        if inside_x <= 0 or inside_y <= 0:
            return "boxes outside of their image", None
        mask = entry.get("segmentation")
        self._check_mask(mask, which, image)
        return "", Instance((x, y, x + width, y + height), label_of[category], mask)

    def _check_mask(self, mask: Any, which: int, image: Mapping) -> None:
        if isinstance(mask, Mapping):
            size = [image["height"], image["width"]]
            if mask.get("size") != size:
                raise self.wrong(
                    f"annotation {which} has a mask of size {mask.get('size')} (height, width), and its image is {size}"
                )
            counts = mask.get("counts")
            if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
                raise self.wrong(
                    f"annotation {which} has run lengths of {sum(counts)} pixels in an image of {size[0] * size[1]}"
                )
            if isinstance(counts, (str, bytes, list)):
                return
        elif isinstance(mask, list) and mask and all(map(_is_polygon, mask)):
            return
        raise self.wrong(
            f"annotation {which} has segmentation {mask!r:.60}; expected polygons of three points or more, or run "
            f"lengths"
        )


def _is_numbers(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return False
    numbers = (isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return all(numbers) and all(map(math.isfinite, values))


def _is_polygon(values: Any) -> bool:
    return _is_numbers(values) and len(values) >= 6 and len(values) % 2 == 0
