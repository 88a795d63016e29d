"""Images in archives: Swin's zip files with their maps, tar files of folders of classes, and WebDataset's."""

import logging
import os
import re
from pathlib import Path

from yacs.config import CfgNode

from vmamba.classification.class_folders import check_same_classes, classes_of_split
from vmamba.classification.source import Source, check_class_count
from vmamba.data.archives import Archive, Tars
from vmamba.data.folders import LeftOut, contents, data_path, what_is
from vmamba.data.images import suffixes
from vmamba.errors import UserError
from vmamba.files import read_text
from vmamba.text import printable, some

logger = logging.getLogger("vmamba")


def open_zip(config: CfgNode, training: bool, on_machine: tuple[int, int]) -> Source:
    root, classes, split = data_path(config), config.MODEL.NUM_CLASSES, "train" if training else "val"
    path, map_path = root / f"{split}.zip", root / f"{split}_map.txt"
    for file in (path, map_path):
        if what_is(file) != "file":
            raise UserError(f"data path '{printable(root)}' has no {file.name}: {contents(root)}")
    samples = _read_map(map_path, classes)
    missing = sorted({*range(classes)} - {label for _, label in samples})
    if missing and training:
        raise UserError(
            f"'{printable(map_path)}' has no image of class {some(missing)}; MODEL.NUM_CLASSES is {classes}"
        )
    check_class_count(f"'{printable(map_path)}'", classes, config, training)
    archive = Archive(path, [name for name, _ in samples])
    _cache(config, archive, on_machine)
    return Source(samples, archive=archive, classes=_folders_of(samples, classes))


def _folders_of(samples: list[tuple[str, int]], classes: int) -> list[str]:
    """The folder of each class, where each has one of its own."""
    found = {label: os.path.basename(os.path.dirname(name)) for name, label in samples}
    alike = all(os.path.basename(os.path.dirname(name)) == found[label] for name, label in samples)
    names = [found.get(label, "") for label in range(classes)]
    return names if alike and all(names) and len({*names}) == classes else []


def _cache(config: CfgNode, archive: Archive | Tars, on_machine: tuple[int, int]) -> None:
    if config.DATA.CACHE_MODE == "part":
        archive.read_ahead(*on_machine)
    if config.DATA.CACHE_MODE == "full":
        archive.hold()


def _read_map(path: Path, classes: int) -> list[tuple[str, int]]:
    """The lines "member <tab or blanks> label" of a map file."""
    samples: dict[str, tuple[int, int]] = {}  # label and line by name
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        place = f"'{printable(path)}', line {number}"
        member, *label = line.rsplit(maxsplit=1)
        if not label or not label[0].isdecimal():
            raise UserError(f"{place}: '{printable(line)}' is not a file's name and a label from 0 on")
        if int(label[0]) >= classes:
            raise UserError(f"{place}: label {label[0]} is out of range; MODEL.NUM_CLASSES is {classes}")
        name = member.strip().lstrip("/")
        if name in samples:
            raise UserError(f"{place}: '{printable(name)}' stands in line {samples[name][1]} already; remove one")
        samples[name] = int(label[0]), number
    if not samples:
        raise UserError(f"'{printable(path)}' names no image")
    return [(name, label) for name, (label, _) in samples.items()]


# ------------------------------------------------------------------------------------------------ tar archives


def tar_files(config: CfgNode, training: bool) -> list[Path]:
    """The archives of a split, where there is no folder of it and no other key says where images lie."""
    data, split = config.DATA, "train" if training else "val"
    if data.TRAIN_LABELS or data.VAL_LABELS or data.VAL_FRACTION or not data.DATA_PATH:
        return []
    root = data_path(config)
    return [] if what_is(root / split) == "folder" else _tars_in(root, split)


# Of an archive's name, by which it is of a split; what is of both is of none.
_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}
_OF_BOTH = {"trainval", "trainvalidation"}


def _tars_in(root: Path, split: str) -> list[Path]:
    """Raises UserError for an archive whose name is of both splits."""
    found = []
    for path in sorted(root.glob("[!.]*.tar")):
        words = {*re.findall("[a-z]+", path.stem.lower())}
        if words & _OF_BOTH or all(words & names for names in _WORDS.values()):
            raise UserError(
                f"'{printable(path)}' is by its name of images to train on and of those held out; make an archive of "
                "each, train.tar and val.tar, or move it away"
            )
        if words & _WORDS[split]:
            found.append(path)
    return found


def open_tars(config: CfgNode, training: bool, tell: bool, on_machine: tuple[int, int]) -> Source:
    """Images in class/image.jpg or train/class/image.jpg; or key.jpg with a label in key.cls, as WebDataset's."""
    root, split = data_path(config), "train" if training else "val"
    archive = Tars(tar_files(config, training), root / f"{split}.index.npz")
    if (archive.numbers >= 0).any():
        samples, chosen = _by_key(config, archive, training, tell)
        classes: list[str] = []
    else:
        samples, chosen, classes = _by_class(config, archive, split, training, tell)
    archive.take(chosen)
    _cache(config, archive, on_machine)
    return Source(samples, archive=archive, classes=classes)


def _by_key(config: CfgNode, archive: Tars, training: bool, tell: bool) -> tuple[list[tuple[str, int]], list[int]]:
    """The images of WebDataset's archives, and their numbers: of each key one, KEY.jpg rather than KEY.mask.png."""
    classes, names = config.MODEL.NUM_CLASSES, [*archive.names]
    labels, left_out = _labels_by_key(archive, names), LeftOut()
    samples, chosen = [], []
    for key, places in _images_by_key(config, archive, names).items():
        plain = [place for place in places if os.path.splitext(names[place])[0] == key[1]]
        place = (plain or places)[0]
        inside = f"'{printable(archive.place(place))}' holds '{printable(names[place])}'"
        if len(plain or places) > 1:
            second = printable(names[(plain or places)[1]])
            raise UserError(f"{inside} and '{second}', two images of one key; leave one out")
        for other in {*places} - {place}:
            left_out.add("beside the image of their key", os.path.join(archive.place(other), names[other]))
        label = labels.get(key)
        if label is None:
            raise UserError(f"{inside} and no .cls file of the same key; add one, or leave the image out")
        if label >= classes:
            raise UserError(f"{inside}, whose label {label} is out of range; MODEL.NUM_CLASSES is {classes}")
        samples.append((names[place], label))
        chosen.append(place)
    if not samples:
        raise UserError(f"{archive} holds no image; it holds {some(names)}")
    missing = sorted({*range(classes)} - {label for _, label in samples})
    if missing and training:
        raise UserError(f"{archive} holds no image of class {some(missing)}; MODEL.NUM_CLASSES is {classes}")
    check_class_count(str(archive), classes, config, training)
    if left_out and tell:
        logger.warning("left out of %s: %s", archive, left_out)
    return samples, chosen


_Key = tuple[Path, str]  # an archive, and a name up to the first dot behind the folders


def _labels_by_key(archive: Tars, names: list[str]) -> dict[_Key, int]:
    """Raises UserError where a key has two files of labels."""
    labels: dict[_Key, tuple[int, str]] = {}
    for place in (archive.numbers >= 0).nonzero()[0].tolist():
        key, name = _key(archive, place, names[place]), names[place]
        if key in labels:
            raise UserError(
                f"'{printable(key[0])}' holds '{printable(labels[key][1])}' and '{printable(name)}', two labels of one "
                "key; leave one out"
            )
        labels[key] = int(archive.numbers[place]), name
    return {key: label for key, (label, _) in labels.items()}


def _images_by_key(config: CfgNode, archive: Tars, names: list[str]) -> dict[_Key, list[int]]:
    known = suffixes(config.MODEL.IN_CHANS)
    found: dict[_Key, list[int]] = {}
    for place, name in enumerate(names):
        if os.path.splitext(name)[1].lower() in known and not os.path.basename(name).startswith("."):
            found.setdefault(_key(archive, place, name), []).append(place)
    return found


def _key(archive: Tars, place: int, name: str) -> _Key:
    folder, file = os.path.split(name)
    return archive.place(place), os.path.join(folder, file.split(".")[0])


def _by_class(
    config: CfgNode, archive: Tars, split: str, training: bool, tell: bool
) -> tuple[list[tuple[str, int]], list[int], list[str]]:
    """The images of archives of folders of classes, their numbers, and the folders."""
    known, left_out, found = suffixes(config.MODEL.IN_CHANS), LeftOut(), []
    for place, name in enumerate(archive.names):
        path, suffix = os.path.join(archive.place(place), name), os.path.splitext(name)[1].lower()
        if os.path.basename(name).startswith("."):
            left_out.add("hidden", path)
        elif suffix not in known:
            left_out.add(suffix or "without a suffix", path)
        elif (folder := _class_in(name, split)) is None:
            where = f"'{printable(path)}' lies in no folder of a class"
            raise UserError(f"{where}, and its archives have no .cls files; put it into one")
        else:
            found.append((folder, name, place))
    classes = sorted({folder for folder, *_ in found})
    if not training:
        root = data_path(config)
        if what_is(root / "train") == "folder":
            check_same_classes(root, split, classes, "train", classes_of_split(root, "train", LeftOut()))
        elif trained_on := _tars_in(root, "train"):
            names = Tars(trained_on, root / "train.index.npz").names
            images = [name for name in names if os.path.splitext(name)[1].lower() in known]
            named = {_class_in(name, "train") for name in images} - {None}
            check_same_classes(root, split, classes, "train", sorted(named))
    check_class_count(str(archive), len(classes), config, training, classes)
    if left_out and tell:
        logger.warning("left out of %s: %s", archive, left_out)
    numbers = {folder: label for label, folder in enumerate(classes)}
    found.sort(key=lambda each: (numbers[each[0]], each[2]))
    return [(name, numbers[folder]) for folder, name, _ in found], [place for *_, place in found], classes


def _class_in(name: str, split: str) -> str | None:
    folders = name.split("/")[:-1]
    folders = folders[1:] if folders[:1] == [split] else folders
    return folders[0] if folders else None
