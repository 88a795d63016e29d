"""Images to evaluate on in folders that are not the training images' classes by their order: which class each is of."""

import json
import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo

from vmamba.errors import UserError
from vmamba.files import read_text
from vmamba.text import printable, some

IMAGENET = ImageNetInfo("imagenet-1k").label_names()  # the WordNet numbers of its classes, by theirs
IMAGENET_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def called(classes: Sequence[str]) -> list[str]:
    """The names of a data set's classes for people: of ImageNet's WordNet numbers its words."""
    if list(classes) != IMAGENET:
        return list(classes)
    known = ImageNetInfo("imagenet-1k")
    return [known.index_to_description(number).partition(",")[0] for number in range(len(classes))]


def numbers_of(folders: Sequence[str], named: str, place: Path, classes: int) -> dict[str, int]:
    """The class of each folder, of a model of so many classes, as DATA.CLASS_MAP names it.

    "imagenet" knows the folders of ImageNet, and so of ImageNet-A, -R and -Sketch, by their WordNet numbers; "numbers"
    are the folders of ImageNet-V2.  A file lies below `place`.
    Raises UserError for a folder that is of no class.
    """
    if named == "imagenet":
        known = {name: number for number, name in enumerate(IMAGENET)}
    elif named == "numbers":
        known = {folder: int(folder) for folder in folders if folder.isdecimal()}
    else:
        known = _read(place / named)
    strangers = [folder for folder in folders if folder not in known]
    if strangers:
        raise UserError(
            f"DATA.CLASS_MAP is {printable(named)}, which does not tell of which class {some(strangers)} is; rename or "
            "remove the folder, or name another map"
        )
    beyond = [folder for folder in folders if known[folder] >= classes]
    if beyond:
        raise UserError(
            f"DATA.CLASS_MAP is {printable(named)}: '{printable(beyond[0])}' is of class {known[beyond[0]]}, and "
            f"MODEL.NUM_CLASSES is {classes}"
        )
    return {folder: known[folder] for folder in folders}


def _read(path: Path) -> dict[str, int]:
    known = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"(.*[^\s,])\s*[,\s]\s*(\d+)", line.strip())
        if not found:
            raise UserError(f"'{printable(path)}', line {number}: '{printable(line)}' is no folder and class's number")
        if found[1] in known:
            raise UserError(
                f"'{printable(path)}', line {number}: '{printable(found[1])}' is named a second time; keep one of its "
                "lines"
            )
        known[found[1]] = int(found[2])
    return known


@cache
def real_labels() -> list[list[int]]:
    """Of ImageNet's validation images by their numbers, from 0 on, all classes that people see in each; none where they
    agree on nothing (arXiv 2006.07159).  The file comes with timm."""
    return json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))


def real_accuracy(answers: Sequence[tuple[str, int]]) -> float | None:
    """Top-1 in percent against those labels, of (image's file, prediction).  None unless all are ImageNet's validation
    images."""
    right = []
    for file, prediction in answers:
        found = IMAGENET_VALIDATION.fullmatch(Path(file).name)
        labels = real_labels()[int(found[1]) - 1] if found and 1 <= int(found[1]) <= 50_000 else None
        if labels is None:
            return None
        if labels:
            right.append(prediction in labels)
    return 100 * sum(right) / len(right) if right else None
