"""Images in folders of classes: split by their folders, by a share of each class, by files of labels or a map."""

import logging
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from vmamba.classification.class_maps import numbers_of
from vmamba.classification.label_files import classes_of, labelled, read_labels
from vmamba.classification.source import Source, check_class_count
from vmamba.data.folders import LeftOut, contents, data_path, image_files, listing, what_is
from vmamba.data.images import suffixes
from vmamba.errors import UserError
from vmamba.text import counted, printable, some

logger = logging.getLogger("vmamba")


def open_folders(config: CfgNode, training: bool, tell: bool) -> Source:
    root, split = data_path(config), "train" if training else "val"
    if config.DATA.CLASS_MAP:
        return _mapped(config, root, tell)
    if config.DATA.TRAIN_LABELS or config.DATA.VAL_LABELS:
        return _listed(config, training, tell)
    if config.DATA.VAL_FRACTION:
        return _divided(config, training, tell)
    names_from = "val" if config.EVAL_MODE and what_is(root / "train") != "folder" else "train"
    left_out = LeftOut()
    classes = classes_of_split(root, split, left_out)
    if split != names_from:
        check_same_classes(root, split, classes, names_from, classes_of_split(root, names_from, LeftOut()))
    return Source(_samples(config, root / split, classes, training, tell, left_out), classes=classes)


def _mapped(config: CfgNode, root: Path, tell: bool) -> Source:
    """Images to evaluate on, in the folders of DATA_PATH/val, or of DATA_PATH, whose classes DATA.CLASS_MAP tells."""
    if not config.EVAL_MODE:
        raise UserError("DATA.CLASS_MAP is of images to evaluate on; give --eval too, or leave it out")
    folder, left_out = root / "val" if what_is(root / "val") == "folder" else root, LeftOut()
    names = _classes_in(folder, left_out)
    numbers = numbers_of(names, config.DATA.CLASS_MAP, root, config.MODEL.NUM_CLASSES)
    samples = _in_folders(config, folder, names, tell, left_out)
    return Source([(path, numbers[names[label]]) for path, label in samples])


def _divided(config: CfgNode, training: bool, tell: bool) -> Source:
    """The images of DATA_PATH/train, or of DATA_PATH, without the held-out share of each class, or that share: always
    the same one, whatever the seed."""
    root = data_path(config)
    if what_is(root / "val") == "folder":
        raise UserError(
            f"DATA.VAL_FRACTION is {config.DATA.VAL_FRACTION:g} and '{printable(root)}' has a folder val; set it to 0, "
            "or move the folder away"
        )
    folder, left_out = root / "train" if what_is(root / "train") == "folder" else root, LeftOut()
    classes = _classes_in(folder, left_out)
    samples = _samples(config, folder, classes, True, tell and training, left_out)
    return _one_side(samples, classes, config.DATA.VAL_FRACTION, training, folder)


def _one_side(
    samples: Sequence[tuple[str, int]], classes: Sequence[str], fraction: float, training: bool, place: Path
) -> Source:
    """Of each class the images that are trained on, or those that are held out."""
    by_class: dict[int, list[str]] = {}
    for path, label in samples:
        by_class.setdefault(label, []).append(path)
    alone = [name for label, name in enumerate(classes) if len(by_class[label]) < 2]
    if alone:
        raise UserError(
            f"'{printable(place)}' has one image in class {some(alone)}, and DATA.VAL_FRACTION needs two, one of them "
            "to hold out; add images or remove the class"
        )
    kept = []
    for label, paths in sorted(by_class.items()):
        held_out = min(max(round(len(paths) * fraction), 1), len(paths) - 1)
        chosen = {*random.Random(label).sample(range(len(paths)), held_out)}
        kept += [(path, label) for number, path in enumerate(paths) if (number in chosen) is not training]
    return Source(kept, drawn_by="DATA.VAL_FRACTION", classes=classes)


def _listed(config: CfgNode, training: bool, tell: bool) -> Source:
    """The images that CSV files list."""
    root, data = data_path(config), config.DATA
    if not data.TRAIN_LABELS:
        raise UserError(f"DATA.VAL_LABELS is '{data.VAL_LABELS}', and classes are told by DATA.TRAIN_LABELS; name both")
    if bool(data.VAL_LABELS) == bool(data.VAL_FRACTION):
        given = "both given" if data.VAL_LABELS else "neither given"
        raise UserError(f"DATA.VAL_LABELS and DATA.VAL_FRACTION say what is held out, and {given}; give one of them")
    file = root / data.TRAIN_LABELS
    lines = read_labels(file, root)
    classes = classes_of(lines)
    check_class_count(f"'{printable(file)}'", len(classes), config, training, classes)
    if data.VAL_FRACTION:
        return _one_side(labelled(lines, classes), classes, data.VAL_FRACTION, training, file)
    if training:
        return Source(labelled(lines, classes), classes=classes)
    held_out = read_labels(root / data.VAL_LABELS, root)
    trained_on = {line.file for line in lines}
    both = [line.image for line in held_out if line.file in trained_on]
    if both and tell:
        logger.warning(
            "%s of '%s' in '%s' too, so that the evaluation counts what was trained on (%s); take them out of one",
            counted(len(both), "image stands", "images stand"),
            printable(root / data.VAL_LABELS),
            printable(data.TRAIN_LABELS),
            some(both),
        )
    return Source(labelled(held_out, classes), classes=classes)


def _samples(
    config: CfgNode, folder: Path, classes: list[str], training: bool, tell: bool, left_out: LeftOut
) -> list[tuple[str, int]]:
    """(path, label) of the images in the folders of the classes."""
    check_class_count(f"'{printable(folder)}'", len(classes), config, training, classes)
    return _in_folders(config, folder, classes, tell, left_out)


def _in_folders(
    config: CfgNode, folder: Path, classes: list[str], tell: bool, left_out: LeftOut
) -> list[tuple[str, int]]:
    """(path, place of the folder in `classes`).  Raises UserError for a folder without an image."""
    samples = [
        (path, label)
        for label, name in enumerate(classes)
        for path in image_files(os.path.join(folder, name), left_out, config.MODEL.IN_CHANS)
    ]
    counts = Counter(label for _, label in samples)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        beside = f" (left out: {left_out})" if left_out else ""
        raise UserError(f"'{printable(folder)}' has no image in class {some(empty)}{beside}; fill or remove the folder")
    if left_out and tell:
        logger.warning(
            "left out of '%s': %s; images are told by the suffixes of Pillow's formats (convert others to PNG or JPEG)",
            printable(folder),
            left_out,
        )
    return samples


def classes_of_split(root: Path, split: str, left_out: LeftOut) -> list[str]:
    folder = root / split
    if what_is(folder) != "folder":
        hint = "; for archives set DATA.ZIP_MODE true (--zip)" if what_is(root / f"{split}.zip") == "file" else ""
        if split == "val" and what_is(root / "train") == "folder":
            hint = "; DATA.VAL_FRACTION 0.1 holds a tenth of train/ out"
        if any(root.glob("*.tar")):
            hint = f"; a tar archive is told by a word of its name: {split}.tar, NAME-{split}-0000.tar"
        raise UserError(f"data path '{printable(root)}' has no {split}/ folder: {contents(root)}{hint}")
    return _classes_in(folder, left_out)


def _classes_in(folder: Path, left_out: LeftOut) -> list[str]:
    classes, files = listing(folder, left_out)
    known = suffixes()
    for file in files:
        path = os.path.join(folder, file)
        if what_is(path) is None and not file.startswith("."):
            raise UserError(f"'{printable(path)}' is a link that leads nowhere; mend or remove it")
        if os.path.splitext(file)[1].lower() in known and not file.startswith("."):
            left_out.add("beside the folders of classes", path)
    if not classes:
        raise UserError(f"'{printable(folder)}' has no folder of a class: {contents(folder)}")
    return classes


def check_same_classes(root: Path, split: str, classes: list[str], names_from: str, named: list[str]) -> None:
    differences = [
        f"only in {place}/: {some(sorted(names))}"
        for place, names in ((split, {*classes} - {*named}), (names_from, {*named} - {*classes}))
        if names
    ]
    if differences:
        forms = ({unicodedata.normalize("NFC", name) for name in names} for names in (classes, named))
        if len(set.intersection(*forms)) > len({*classes} & {*named}):
            differences.append("some look the same in other Unicode forms (NFC, NFD): rename the folders in one")
        raise UserError(
            f"'{printable(root)}' has other classes in {split}/ than in {names_from}/; {'; '.join(differences)}"
        )
