"""Labelled images by index: handwritten digits, solar cells, folders, Swin's zip archives, CIFAR, and what timm opens.

`open_dataset` checks what can be checked without reading images; reading one raises UnreadableImage.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity
from yacs.config import CfgNode

from vmamba.classification.archived import open_tars, open_zip, tar_files
from vmamba.classification.class_folders import open_folders
from vmamba.classification.elpv import GRADES, read_cells
from vmamba.classification.source import Source, check_class_count
from vmamba.data.folders import contents, data_path, what_is
from vmamba.errors import UserError, unknown
from vmamba.extensions import DATASETS
from vmamba.files import cannot_read
from vmamba.text import printable

DIGITS_HELD_OUT = 360  # of 1,797
_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def open_dataset(config: CfgNode, *, training: bool, rank: int, on_machine: tuple[int, int]) -> Source:
    """The training or the validation images of DATA.DATASET.  Rank 0 tells which files are left out; `on_machine` is
    which of its machine's processes this is, and how many there are.

    Raises UserError when they are not there, or do not fit MODEL.NUM_CLASSES, or are of one class and for training.
    """
    check_dataset(config)
    name = config.DATA.DATASET
    if name in DATASETS:
        return _registered(config, training)
    if name == "digits":
        return _digits(config, training)
    if name == "elpv":
        check_class_count("elpv", len(GRADES), config, training)
        return Source(read_cells(training), classes=GRADES)
    if name in _CIFAR:
        return _cifar(config, training)
    if name == "imagenet" and config.DATA.ZIP_MODE:
        return open_zip(config, training, on_machine)
    if name == "imagenet" and tar_files(config, training):
        return open_tars(config, training, rank == 0, on_machine)
    if name == "imagenet":
        return open_folders(config, training, tell=rank == 0)
    return _from_timm(config, training)


def check_dataset(config: CfgNode) -> None:
    """Raises UserError for a DATA.DATASET that there is not, and for keys of DATA that do not go with it."""
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
    known = ["digits", "elpv", "imagenet", *_CIFAR, *DATASETS]
    if name not in known and "/" not in name:
        raise unknown("DATA.DATASET", name, [*known, "torch/<name>", "hfds/<name>"])


def _digits(config: CfgNode, training: bool) -> Source:
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(
        np.arange(len(digits.target)), test_size=DIGITS_HELD_OUT, stratify=digits.target, random_state=0
    )
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), 0..16 in the package
    samples = [(Image.fromarray(pixels[i]), int(digits.target[i])) for i in np.sort(split[0 if training else 1])]
    check_class_count("the digits", 10, config, training)
    return Source(samples, place="the digits", classes=range(10))


def _cifar(config: CfgNode, training: bool) -> Source:
    root, name = data_path(config), config.DATA.DATASET
    try:
        dataset = _CIFAR[name](str(root), train=training)
    except OSError as error:
        raise cannot_read(error.filename or root, error) from error
    except RuntimeError as error:
        raise _incomplete_cifar(root, name) from error
    check_class_count(name, len(dataset.classes), config, training)
    return Source(dataset, place=f"{name} in {root}", classes=dataset.classes)


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
    classes = _classes_told(samples)
    if classes:
        check_class_count(name, len(classes), config, training)
    return Source(samples, place=f"the {part} images of {name}", by_user=True, classes=classes)


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
    numbers = getattr(samples, "class_to_idx", None) or {}
    classes = _classes_told(dataset) or sorted(numbers, key=numbers.get)
    if classes:
        check_class_count(name, len(classes), config, training)
    return Source(samples, place=name, classes=classes)


def _classes_told(samples: object) -> list[str]:
    """What a data set calls its classes, as torchvision's do: of several names of one the first; none where it does not
    tell."""
    told = getattr(samples, "classes", None)
    return [str(name[0] if isinstance(name, tuple) else name) for name in (() if told is None else told)]
