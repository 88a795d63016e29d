"""Labelled images by index: handwritten digits, folders, Swin's zip archives, CIFAR, and what timm opens.

`open_dataset` checks what can be checked without reading images; reading one raises UnreadableImage.
"""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from yacs.config import CfgNode

from vmamba.data.images import UnreadableImage
from vmamba.errors import UserError, unknown

DIGITS_HELD_OUT = 360  # of 1,797
_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class Source:
    """Samples of (image, label).  `read` makes the first of a sample, a path below `place`, bytes; without it the
    samples hold an image or an open file, and are themselves read on access."""

    def __init__(self, samples: Sequence, place: str, *, read: Callable[[str], bytes] | None = None):
        self.samples = samples
        self.place = place
        self.read = read

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return os.path.join(self.place, self.samples[index][0]) if self.read else f"image {index} of {self.place}"

    def load(self, index: int, channels: int) -> tuple[Image.Image, int]:
        """The decoded image, of 1 or 3 channels of 8 bits, and its label.  Raises UnreadableImage."""
        try:
            image, label = self.samples[index][:2]
            return to_image(self.read(image) if self.read else image, channels), int(-1 if label is None else label)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib.error, struct.error, ...
            raise UnreadableImage(f"cannot read '{self.name(index)}': {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a format that Pillow knows"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def to_image(image: Image.Image | bytes | BinaryIO, channels: int) -> Image.Image:
    """`image` as 8-bit grayscale (1 channel) or RGB (3), whatever its mode."""
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            opened.load()
            image = opened
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def open_dataset(config: CfgNode, *, training: bool, rank: int, world_size: int) -> Source:
    """The training or the validation images of DATA.DATASET.

    Raises UserError when they are not there, or do not fit MODEL.NUM_CLASSES.
    """
    name = config.DATA.DATASET
    if config.DATA.ZIP_MODE and name != "imagenet":
        raise UserError(f"--zip reads archives of imagenet's form, but DATA.DATASET is '{name}'; leave it out")
    if name == "digits":
        return _digits(config, training)
    if name in _CIFAR:
        return _cifar(config, training)
    if name == "imagenet":
        split = "train" if training else "val"
        return _archive(config, split, rank, world_size) if config.DATA.ZIP_MODE else _folders(config, split)
    if "/" in name:
        return _from_timm(config, training)
    raise unknown("DATA.DATASET", name, ["digits", "imagenet", *_CIFAR, "torch/<name>", "hfds/<name>"])


def _digits(config: CfgNode, training: bool) -> Source:
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(
        np.arange(len(digits.target)), test_size=DIGITS_HELD_OUT, stratify=digits.target, random_state=0
    )
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), 0..16 in the package
    samples = [(Image.fromarray(pixels[i]), int(digits.target[i])) for i in np.sort(split[0 if training else 1])]
    _check_class_count("the digits", 10, config)
    return Source(samples, "the digits")


def _cifar(config: CfgNode, training: bool) -> Source:
    root, name = _data_path(config), config.DATA.DATASET
    kind = _CIFAR[name]
    try:
        dataset = kind(str(root), train=training)
    except (RuntimeError, OSError) as error:
        raise UserError(f"'{root}' does not hold {name} whole: {_listing(root)}; unpack {kind.url} there") from error
    _check_class_count(name, len(dataset.classes), config)
    return Source(dataset, f"{name} in {root}")


def _from_timm(config: CfgNode, training: bool) -> Source:
    name = config.DATA.DATASET
    split = config.DATA.TRAIN_SPLIT if training else config.DATA.VAL_SPLIT
    root = config.DATA.DATA_PATH and str(_data_path(config))
    try:
        dataset = create_dataset(name, root=root or None, split=split, is_training=training)
    except Exception as error:  # each of its libraries has its own
        raise UserError(f"timm cannot open split '{split}' of '{name}' at '{root}': {error}") from error
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"DATA.DATASET '{name}' is a stream; resuming needs images by index, as torch/ and hfds/ give them"
        )
    samples = dataset.reader if isinstance(dataset, ImageDataset) else dataset  # its own loading hides bad images
    classes = getattr(dataset, "classes", None) or getattr(samples, "class_to_idx", None)
    if classes:
        _check_class_count(name, len(classes), config)
    return Source(samples, name)


# ------------------------------------------------------------------------------------------------ folders


def _folders(config: CfgNode, split: str) -> Source:
    root = _data_path(config)
    names_from = "val" if config.EVAL_MODE and not (root / "train").is_dir() else "train"
    classes = _classes(root, names_from)
    if split != names_from:
        others = _classes(root, split)
        differences = [
            f"only in {place}/: {_some(sorted(names))}"
            for place, names in ((split, {*others} - {*classes}), (names_from, {*classes} - {*others}))
            if names
        ]
        if differences:
            raise UserError(f"'{root}' has other classes in {split}/ than in {names_from}/; {'; '.join(differences)}")
    _check_class_count(f"'{root / names_from}'", len(classes), config)
    samples = make_dataset(
        str(root / split), {name: i for i, name in enumerate(classes)}, extensions=IMG_EXTENSIONS, allow_empty=True
    )
    counts = Counter(label for _, label in samples)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        raise UserError(f"'{root / split}' has no image in class {_some(empty)}; fill or remove the folder")
    return Source(samples, "", read=_read_file)


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def _classes(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        hint = "; for archives add --zip" if (root / f"{split}.zip").is_file() else ""
        raise UserError(f"data path '{root}' has no {split}/ folder: {_listing(root)}{hint}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"'{folder}' has no folder of a class: {_listing(folder)}")
    return classes


# ------------------------------------------------------------------------------------------------ archives


class Archive:
    """Reads members of a zip file.  Each process opens it for itself, at its first read."""

    def __init__(self, path: Path):
        self.path = path
        self.kept: dict[str, bytes] = {}
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by which process

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}

    def read(self, member: str) -> bytes:
        if member in self.kept:
            return self.kept[member]
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1].read(member)


def _archive(config: CfgNode, split: str, rank: int, world_size: int) -> Source:
    root, classes = _data_path(config), config.MODEL.NUM_CLASSES
    path, map_path = root / f"{split}.zip", root / f"{split}_map.txt"
    for file in (path, map_path):
        if not file.is_file():
            raise UserError(f"data path '{root}' has no {file.name}: {_listing(root)}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"'{path}' is not a zip archive, or is truncated")
    samples = _read_map(map_path, classes)
    missing = sorted({*range(classes)} - {label for _, label in samples})
    if missing and split == "train":
        raise UserError(f"'{map_path}' has no image of class {_some(missing)}; MODEL.NUM_CLASSES is {classes}")
    archive = Archive(path)
    source = Source(samples, str(path), read=archive.read)
    if config.DATA.CACHE_MODE != "no":
        full = config.DATA.CACHE_MODE == "full"
        members = {name for i, (name, _) in enumerate(samples) if full or i % world_size == rank}
        archive.kept = _keep(archive, members)
    return source


def _keep(archive: Archive, members: set[str]) -> dict[str, bytes]:
    """The bytes of `members`; one that cannot be read is left to be reported when it is wanted."""
    kept = {}
    for member in members:
        try:
            kept[member] = archive.read(member)
        except (KeyError, OSError, zipfile.BadZipFile):
            continue
    return kept


def _read_map(path: Path, classes: int) -> list[tuple[str, int]]:
    """The lines "member <tab or blanks> label" of a map file."""
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        member, *label = line.rsplit(maxsplit=1)
        if not label or not label[0].isdecimal():
            raise UserError(f"'{path}', line {number}: '{line}' is not a file's name and a label from 0 on")
        if int(label[0]) >= classes:
            raise UserError(
                f"'{path}', line {number}: label {label[0]} is out of range; MODEL.NUM_CLASSES is {classes}"
            )
        samples.append((member.strip().lstrip("/"), int(label[0])))
    if not samples:
        raise UserError(f"'{path}' names no image")
    return samples


# ------------------------------------------------------------------------------------------------ checks


def _data_path(config: CfgNode) -> Path:
    path = Path(config.DATA.DATA_PATH)
    if not config.DATA.DATA_PATH:
        raise UserError(f"DATA.DATASET '{config.DATA.DATASET}' is read from a folder; name it with --data-path")
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"data path '{path}' {what}; name the folder of {config.DATA.DATASET} with --data-path")
    return path


def _check_class_count(what: str, classes: int, config: CfgNode) -> None:
    if classes != config.MODEL.NUM_CLASSES:
        raise UserError(
            f"{what} has {classes} classes, but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}; "
            f"add --opts MODEL.NUM_CLASSES {classes} or choose another data path"
        )


def _listing(folder: Path) -> str:
    return f"it holds {_some(sorted(entry.name for entry in folder.iterdir()))}"


def _some(names: Sequence[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "nothing"
