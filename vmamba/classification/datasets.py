"""Labelled images by index: handwritten digits, solar cells, folders, Swin's zip archives, CIFAR, and what timm opens.

`open_dataset` checks what can be checked without reading images; reading one raises UnreadableImage.
"""

import logging
import os
import random
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity
from yacs.config import CfgNode

from vmamba.classification.class_maps import numbers_of
from vmamba.classification.elpv import GRADES, read_cells
from vmamba.classification.label_files import classes_of, labelled, read_labels
from vmamba.data.archives import Archive, Tars
from vmamba.data.folders import LeftOut, contents, data_path, image_files, listing, what_is
from vmamba.data.images import decode, reading, suffixes
from vmamba.data.names import Labelled
from vmamba.errors import UserError, unknown
from vmamba.extensions import DATASETS
from vmamba.files import cannot_read, read_text
from vmamba.text import counted, printable, some

logger = logging.getLogger("vmamba")

T = TypeVar("T")
DIGITS_HELD_OUT = 360  # of 1,797
_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class Source:
    """Samples of (image, label).  The image is a file of `archive`; or what the samples hold, which are read on access:
    an image or an open file of `place`, or without a place the path of a file."""

    def __init__(
        self,
        samples: Sequence,
        *,
        archive: Archive | Tars | None = None,
        place: str | None = None,
        by_user: bool = False,  # samples are made by code of a user's module
    ):
        self.samples = Labelled(samples) if place is None else samples
        self.archive, self.place, self.by_user = archive, place, by_user

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """For a sentence."""
        if self.place is not None:
            return printable(f"image {index} of {self.place}")
        return printable(os.path.join(self.archive.place(index) if self.archive else "", self.samples[index][0]))

    def load(self, index: int, channels: int, decode: Callable[..., T] = decode) -> tuple[T, int]:
        """The image of so many channels, as `decode` or `decode_pixels` gives it, and its label.  Raises
        UnreadableImage; UserError for a mistake of a user's code, which no other image would mend."""
        name = self.name(index)
        with reading(name), _mistakes(name) if self.by_user else nullcontext():
            file, label = self.read(index)
        return decode(file, channels, name), label

    def read(self, index: int) -> tuple[Any, int]:
        """The bytes of the image's file, or what else `decode` takes, and its label.  May raise any Exception;
        UserError for a label that is no number."""
        image, label = self.samples[index][:2]
        if self.archive:
            image = self.archive.read(index)
        elif isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        try:
            return image, int(-1 if label is None else label)
        except (TypeError, ValueError) as error:
            name = self.name(index)
            raise UserError(f"label {label!r:.40} of '{name}' is no class's number; give 0, 1, 2, ...") from error

    def labels(self) -> Sequence[int] | None:
        """Of all samples; None where only reading every image would tell."""
        if isinstance(self.samples, list):
            return [sample[1] for sample in self.samples]
        return getattr(self.samples, "targets", None)


# What code raises that is wrong, unlike what a file that is damaged makes it raise.
_MISTAKES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)


@contextmanager
def _mistakes(name: str) -> Iterator[None]:
    """A mistake of a registered data set's code, while it makes a sample, is one sentence with its place."""
    try:
        yield
    except _MISTAKES as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the code that makes {name} raised {type(error).__name__} ({printable(error)}) in '{place.filename}', "
            f"line {place.lineno}; mend it"
        ) from error


def open_dataset(config: CfgNode, *, training: bool, rank: int, on_machine: tuple[int, int]) -> Source:
    """The training or the validation images of DATA.DATASET.  Rank 0 tells which files are left out; `on_machine` is
    which of its machine's processes this is, and how many there are.

    Raises UserError when they are not there, or do not fit MODEL.NUM_CLASSES, or are of one class and for training.
    """
    name = config.DATA.DATASET
    if config.DATA.ZIP_MODE and name != "imagenet":
        raise UserError(f"--zip reads archives of imagenet's form, but DATA.DATASET is '{name}'; leave it out")
    if config.DATA.VAL_FRACTION and (name != "imagenet" or config.DATA.ZIP_MODE):
        what = "an archive" if config.DATA.ZIP_MODE else f"DATA.DATASET '{name}'"
        share = f"DATA.VAL_FRACTION is {config.DATA.VAL_FRACTION:g}"
        raise UserError(f"{share}, and {what} comes with held-out images of its own; set it to 0")
    if (config.DATA.TRAIN_LABELS or config.DATA.VAL_LABELS) and (name != "imagenet" or config.DATA.ZIP_MODE):
        what = "an archive" if config.DATA.ZIP_MODE else f"DATA.DATASET '{name}'"
        raise UserError(f"DATA.TRAIN_LABELS and VAL_LABELS are of images in folders, and {what} has labels; empty them")
    if config.DATA.CLASS_MAP and (name != "imagenet" or config.DATA.ZIP_MODE or config.DATA.TRAIN_LABELS):
        raise UserError("DATA.CLASS_MAP is of folders of images (DATA.DATASET imagenet); leave it out")
    if name in DATASETS:
        return _registered(config, training)
    if name == "digits":
        return _digits(config, training)
    if name == "elpv":
        _check_class_count("elpv", len(GRADES), config, training)
        return Source(read_cells(training))
    if name in _CIFAR:
        return _cifar(config, training)
    if name == "imagenet" and config.DATA.ZIP_MODE:
        return _archive(config, training, on_machine)
    if name == "imagenet" and _tar_files(config, training):
        return _tars(config, training, rank == 0, on_machine)
    if name == "imagenet":
        return _folders(config, training, tell=rank == 0)
    if "/" in name:
        return _from_timm(config, training)
    known = ["digits", "elpv", "imagenet", *_CIFAR, "torch/<name>", "hfds/<name>", *DATASETS]
    raise unknown("DATA.DATASET", name, known)


def _digits(config: CfgNode, training: bool) -> Source:
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(
        np.arange(len(digits.target)), test_size=DIGITS_HELD_OUT, stratify=digits.target, random_state=0
    )
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), 0..16 in the package
    samples = [(Image.fromarray(pixels[i]), int(digits.target[i])) for i in np.sort(split[0 if training else 1])]
    _check_class_count("the digits", 10, config, training)
    return Source(samples, place="the digits")


def _cifar(config: CfgNode, training: bool) -> Source:
    root, name = data_path(config), config.DATA.DATASET
    try:
        dataset = _CIFAR[name](str(root), train=training)
    except OSError as error:
        raise cannot_read(error.filename or root, error) from error
    except RuntimeError as error:
        raise _incomplete_cifar(root, name) from error
    _check_class_count(name, len(dataset.classes), config, training)
    return Source(dataset, place=f"{name} in {root}")


def _incomplete_cifar(root: Path, name: str) -> UserError:
    """What torchvision found: a file that is missing, or is not the published one."""
    kind = _CIFAR[name]
    for file, checksum in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
        path = root / kind.base_folder / file
        if what_is(path) == "file" and not check_integrity(str(path), checksum):
            return UserError(
                f"'{printable(path)}' is not the published file (its MD5 is not {checksum}); unpack {kind.url} again, "
                "or, if it was changed on purpose, write the images into folders of classes (DATA.DATASET imagenet)"
            )
    return UserError(f"'{printable(root)}' does not hold {name} whole: {contents(root)}; unpack {kind.url} there")


def _registered(config: CfgNode, training: bool) -> Source:
    """Of `vmamba.extensions.register_dataset`."""
    name, part = config.DATA.DATASET, "training" if training else "held-out"
    samples = DATASETS[name](config, training)
    if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        kind = type(samples).__name__
        raise UserError(f"DATA.DATASET '{name}' gives a {kind}; register what gives a sequence of (image, label)")
    if not len(samples):
        raise UserError(f"DATA.DATASET '{name}' has no {part} image; check DATA.DATA_PATH '{config.DATA.DATA_PATH}'")
    classes = getattr(samples, "classes", None)
    if classes:
        _check_class_count(name, len(classes), config, training)
    return Source(samples, place=f"the {part} images of {name}", by_user=True)


def _from_timm(config: CfgNode, training: bool) -> Source:
    name = config.DATA.DATASET
    split = config.DATA.TRAIN_SPLIT if training else config.DATA.VAL_SPLIT
    root = config.DATA.DATA_PATH and str(data_path(config))
    try:
        dataset = create_dataset(name, root=root or None, split=split, is_training=training)
    except Exception as error:  # each of its libraries has its own
        raise UserError(printable(f"timm cannot open split '{split}' of '{name}' at '{root}': {error}")) from error
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"DATA.DATASET '{name}' is a stream; resuming needs images by index, as torch/ and hfds/ give them"
        )
    samples = dataset.reader if isinstance(dataset, ImageDataset) else dataset  # its own loading hides bad images
    classes = getattr(dataset, "classes", None) or getattr(samples, "class_to_idx", None)
    if classes:
        _check_class_count(name, len(classes), config, training)
    return Source(samples, place=name)


# ------------------------------------------------------------------------------------------------ folders


def _folders(config: CfgNode, training: bool, tell: bool) -> Source:
    root, split = data_path(config), "train" if training else "val"
    if config.DATA.CLASS_MAP:
        return _mapped(config, root, tell)
    if config.DATA.TRAIN_LABELS or config.DATA.VAL_LABELS:
        return _listed(config, training, tell)
    if config.DATA.VAL_FRACTION:
        return _divided(config, training, tell)
    names_from = "val" if config.EVAL_MODE and what_is(root / "train") != "folder" else "train"
    left_out = LeftOut()
    classes = _classes(root, split, left_out)
    if split != names_from:
        _check_same_classes(root, split, classes, names_from, _classes(root, names_from, LeftOut()))
    return Source(_samples(config, root / split, classes, training, tell, left_out))


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
    return Source(_one_side(samples, classes, config.DATA.VAL_FRACTION, training, folder))


def _one_side(
    samples: Sequence[tuple[str, int]], classes: Sequence[str], fraction: float, training: bool, place: Path
) -> list[tuple[str, int]]:
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
    return kept


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
    _check_class_count(f"'{printable(file)}'", len(classes), config, training, classes)
    if data.VAL_FRACTION:
        return Source(_one_side(labelled(lines, classes), classes, data.VAL_FRACTION, training, file))
    if training:
        return Source(labelled(lines, classes))
    held_out = read_labels(root / data.VAL_LABELS, root)
    trained_on = {os.path.normpath(line.image) for line in lines}
    both = [line.image for line in held_out if os.path.normpath(line.image) in trained_on]
    if both and tell:
        logger.warning(
            "%s of '%s' in '%s' too, so that the evaluation counts what was trained on (%s); take them out of one",
            counted(len(both), "image stands", "images stand"),
            printable(root / data.VAL_LABELS),
            printable(data.TRAIN_LABELS),
            some(both),
        )
    return Source(labelled(held_out, classes))


def _samples(
    config: CfgNode, folder: Path, classes: list[str], training: bool, tell: bool, left_out: LeftOut
) -> list[tuple[str, int]]:
    """(path, label) of the images in the folders of the classes."""
    _check_class_count(f"'{printable(folder)}'", len(classes), config, training, classes)
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


def _classes(root: Path, split: str, left_out: LeftOut) -> list[str]:
    folder = root / split
    if what_is(folder) != "folder":
        hint = "; for archives set DATA.ZIP_MODE true (--zip)" if what_is(root / f"{split}.zip") == "file" else ""
        if split == "val" and what_is(root / "train") == "folder":
            hint = "; DATA.VAL_FRACTION 0.1 holds a tenth of train/ out"
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


def _check_same_classes(root: Path, split: str, classes: list[str], names_from: str, named: list[str]) -> None:
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


# ------------------------------------------------------------------------------------------------ archives


def _archive(config: CfgNode, training: bool, on_machine: tuple[int, int]) -> Source:
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
    _check_class_count(f"'{printable(map_path)}'", classes, config, training)
    archive = Archive(path, [name for name, _ in samples])
    _cache(config, archive, on_machine)
    return Source(samples, archive=archive)


def _cache(config: CfgNode, archive: Archive | Tars, on_machine: tuple[int, int]) -> None:
    if config.DATA.CACHE_MODE == "part":
        archive.read_ahead(*on_machine)
    if config.DATA.CACHE_MODE == "full":
        archive.hold()


def _read_map(path: Path, classes: int) -> list[tuple[str, int]]:
    """The lines "member <tab or blanks> label" of a map file."""
    samples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        place = f"'{printable(path)}', line {number}"
        member, *label = line.rsplit(maxsplit=1)
        if not label or not label[0].isdecimal():
            raise UserError(f"{place}: '{printable(line)}' is not a file's name and a label from 0 on")
        if int(label[0]) >= classes:
            raise UserError(f"{place}: label {label[0]} is out of range; MODEL.NUM_CLASSES is {classes}")
        samples.append((member.strip().lstrip("/"), int(label[0])))
    if not samples:
        raise UserError(f"'{printable(path)}' names no image")
    return samples


# ------------------------------------------------------------------------------------------------ tar archives


def _tar_files(config: CfgNode, training: bool) -> list[Path]:
    """The archives of a split, where there is no folder of it and no other key says where images lie."""
    data, split = config.DATA, "train" if training else "val"
    if data.TRAIN_LABELS or data.VAL_LABELS or data.VAL_FRACTION or not data.DATA_PATH:
        return []
    root = data_path(config)
    return [] if what_is(root / split) == "folder" else _tars_in(root, split)


def _tars_in(root: Path, split: str) -> list[Path]:
    return sorted(path for path in root.glob(f"*{split}*.tar") if not path.name.startswith("."))


def _tars(config: CfgNode, training: bool, tell: bool, on_machine: tuple[int, int]) -> Source:
    """Images in class/image.jpg or train/class/image.jpg; or key.jpg with a label in key.cls, as WebDataset's."""
    root, split = data_path(config), "train" if training else "val"
    archive = Tars(_tar_files(config, training), root / f"{split}.index.npz")
    if (archive.numbers >= 0).any():
        samples, chosen = _by_key(config, archive, training)
    else:
        samples, chosen = _by_class(config, archive, split, training, tell)
    archive.take(chosen)
    _cache(config, archive, on_machine)
    return Source(samples, archive=archive)


def _by_key(config: CfgNode, archive: Tars, training: bool) -> tuple[list[tuple[str, int]], list[int]]:
    """The images of WebDataset's archives, and their numbers."""
    known, classes = suffixes(config.MODEL.IN_CHANS), config.MODEL.NUM_CLASSES
    names, numbers = [*archive.names], archive.numbers.tolist()
    labels = {_key(archive, place, name): numbers[place] for place, name in enumerate(names) if numbers[place] >= 0}
    samples, chosen = [], []
    for place, name in enumerate(names):
        if os.path.splitext(name)[1].lower() not in known or os.path.basename(name).startswith("."):
            continue
        label = labels.get(_key(archive, place, name))
        inside = f"'{printable(archive.place(place))}' holds '{printable(name)}'"
        if label is None:
            raise UserError(f"{inside} and no .cls file of the same key; add one, or leave the image out")
        if label >= classes:
            raise UserError(f"{inside}, whose label {label} is out of range; MODEL.NUM_CLASSES is {classes}")
        samples.append((name, label))
        chosen.append(place)
    if not samples:
        raise UserError(f"{archive} holds no image; it holds {some(names)}")
    missing = sorted({*range(classes)} - {label for _, label in samples})
    if missing and training:
        raise UserError(f"{archive} holds no image of class {some(missing)}; MODEL.NUM_CLASSES is {classes}")
    _check_class_count(str(archive), classes, config, training)
    return samples, chosen


def _key(archive: Tars, place: int, name: str) -> tuple[Path, str]:
    """Up to the first dot behind the folders, in its archive."""
    folder, file = os.path.split(name)
    return archive.place(place), os.path.join(folder, file.split(".")[0])


def _by_class(
    config: CfgNode, archive: Tars, split: str, training: bool, tell: bool
) -> tuple[list[tuple[str, int]], list[int]]:
    """The images of archives of folders of classes, and their numbers."""
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
            _check_same_classes(root, split, classes, "train", _classes(root, "train", LeftOut()))
        elif trained_on := _tars_in(root, "train"):
            names = Tars(trained_on, root / "train.index.npz").names
            images = [name for name in names if os.path.splitext(name)[1].lower() in known]
            named = {_class_in(name, "train") for name in images} - {None}
            _check_same_classes(root, split, classes, "train", sorted(named))
    _check_class_count(str(archive), len(classes), config, training, classes)
    if left_out and tell:
        logger.warning("left out of %s: %s", archive, left_out)
    numbers = {folder: label for label, folder in enumerate(classes)}
    found.sort(key=lambda each: (numbers[each[0]], each[2]))
    return [(name, numbers[folder]) for folder, name, _ in found], [place for *_, place in found]


def _class_in(name: str, split: str) -> str | None:
    folders = name.split("/")[:-1]
    folders = folders[1:] if folders[:1] == [split] else folders
    return folders[0] if folders else None


# ------------------------------------------------------------------------------------------------ checks


def _check_class_count(what: str, classes: int, config: CfgNode, training: bool, names: Sequence[str] = ()) -> None:
    """Raises UserError where `what` does not have the model's classes; `names` are those of its folders, sorted."""
    if classes == 1 and training:
        raise UserError(f"{what} has one class, and training tells classes apart; add another or choose other data")
    if classes != config.MODEL.NUM_CLASSES:
        shown = [*names[:5], "...", names[-1]] if len(names) > 6 else names  # at the ends lies what is no word
        named = f" ({', '.join(map(printable, shown))})" if names else ""
        raise UserError(
            f"{what} has {counted(classes, 'class', 'classes')}{named}, but MODEL.NUM_CLASSES is "
            f"{config.MODEL.NUM_CLASSES}; set it to {classes} (main.py: --opts MODEL.NUM_CLASSES {classes}) or choose "
            "another data path"
        )
