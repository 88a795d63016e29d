"""Images with maps of their pixels' classes, by index: ADE20K, any two folders, and scenes made here."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from vmamba.config import sides
from vmamba.data.folders import LeftOut, contents, data_path, image_files, what_is
from vmamba.data.images import decode, open_image, reading
from vmamba.data.names import checksum
from vmamba.data.scenes import scene
from vmamba.errors import UserError
from vmamba.text import printable, some

logger = logging.getLogger("vmamba")
_ADE20K = {
    "TRAIN_IMAGES": "images/training",
    "TRAIN_MAPS": "annotations/training",
    "VAL_IMAGES": "images/validation",
    "VAL_MAPS": "annotations/validation",
}
_INDICES = ("L", "P", "1")  # Pillow's modes whose values are indices
_WIDE = ("I", "I;16", "I;16L", "I;16B")


@dataclass(frozen=True)
class Sample:
    image: Image.Image  # RGB
    classes: np.ndarray  # (H, W) uint8, what does not count being `ignore_index`
    name: str  # no other image of the split has it; "a/b" of a/b.jpg


class Folders:
    """Pairs of an image and a map of the same name, from two folders.

    What is in the folders beside is told in the log.
    Raises UserError where a folder is missing or empty, an image has no map, or two have one name.
    """

    def __init__(self, config: CfgNode, training: bool, tell: bool):
        data, split = config.DATA, "TRAIN" if training else "VAL"
        places = _ADE20K if data.DATASET == "ade20k" else data
        root = data_path(config)
        images, maps = (_folder(root, places[f"{split}_{kind}"]) for kind in ("IMAGES", "MAPS"))
        self.classes, self.ignored = config.MODEL.NUM_CLASSES, data.IGNORE_INDEX
        self.from_one = data.ZERO_IS_IGNORED or data.DATASET == "ade20k"
        left_out = LeftOut()
        found, maps_of = _by_name(images, left_out), _by_name(maps, left_out)
        lacking = [name for name in found if name not in maps_of]
        if lacking:
            raise UserError(
                f"'{printable(maps)}' has no map of {some(lacking)}, images in '{printable(images)}'; a map has its "
                f"image's name with another suffix"
            )
        for name in maps_of.keys() - found.keys():
            left_out.add("map without an image", maps_of[name])
        if left_out and tell:
            logger.warning("left out of '%s' and '%s': %s", printable(images), printable(maps), left_out)
        self.examples = [(name, path, maps_of[name]) for name, path in found.items()]

    def __len__(self) -> int:
        return len(self.examples)

    def name(self, index: int) -> str:
        return printable(self.examples[index][1])

    def contents(self) -> dict[str, str]:
        """For `Loader.contents`."""
        return {"checksum": checksum([name for name, *_ in self.examples])}

    def load(self, index: int) -> Sample:
        name, path, map_path = self.examples[index]
        image, classes = decode(path, 3, path), self._read_map(map_path)
        if classes.shape != (image.height, image.width):
            stored = " as it is stored (an EXIF orientation is not applied)" if classes.shape == image.size else ""
            raise UserError(
                f"the map '{printable(map_path)}' is {classes.shape[1]} x {classes.shape[0]} pixels and its image "
                f"{image.width} x {image.height}{stored}; make it again for that image"
            )
        return Sample(image, classes, name)

    def _read_map(self, path: str) -> np.ndarray:
        with reading(path), open_image(path) as file:
            file.load()
            mode, values = file.mode, np.array(file)
        if mode not in (*_INDICES, *_WIDE):
            raise UserError(
                f"the map '{printable(path)}' is a picture of mode {mode}; expected one number a pixel, the index of "
                f"its class (a PNG of mode L or P)"
            )
        values = values.astype(np.int64)
        if self.from_one:
            values = np.where(values == 0, self.ignored, values - 1)
            values[values == 254] = self.ignored  # 255 in the file
        wrong = values[(values != self.ignored) & ((values < 0) | (values >= self.classes))]
        if wrong.size:
            raise UserError(
                f"the map '{printable(path)}' holds label {wrong.max() + self.from_one}; MODEL.NUM_CLASSES is "
                f"{self.classes}" + (", labels counting from 1" if self.from_one else f", and {self.ignored} ignored")
            )
        return values.astype(np.uint8)


class Scenes:
    """Scenes of digits, `DATA.CROP_SIZE` pixels wide: the background and ten digits."""

    def __init__(self, config: CfgNode, training: bool, tell: bool):
        self.training, self.count = training, config.DATA.SCENES[not training]
        self.side, self.data = max(sides(config.DATA.CROP_SIZE)), config.DATA
        if config.MODEL.NUM_CLASSES != 11:
            raise UserError(f"scenes have 11 classes, and MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}")

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Sample:
        data = self.data
        made = scene(index, self.training, self.side, data.DIGITS, data.DIGIT_SIZES, data.CONTRAST)
        return Sample(made.image, made.classes, f"scene{index}")


def open_dataset(config: CfgNode, training: bool, tell: bool = True) -> Folders | Scenes:
    """DATA.DATASET's images to train on, or held out; `tell`: the log what is left out of their folders."""
    kind = Scenes if config.DATA.DATASET == "scenes" else Folders
    return kind(config, training, tell)


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    if what_is(folder) != "folder":
        raise UserError(f"data path '{printable(root)}' has no folder {name}: {contents(root)}")
    return folder


def _by_name(folder: Path, left_out: LeftOut) -> dict[str, str]:
    """The images in `folder` and below it, by their paths in it without suffix."""
    found: dict[str, str] = {}
    for path in image_files(folder, left_out):
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if name in found:
            raise UserError(
                f"'{printable(found[name])}' and '{printable(path)}' differ in their suffixes alone, and an image and "
                f"its map are told by the rest; rename or remove one"
            )
        found[name] = path
    if not found:
        raise UserError(f"'{printable(folder)}' has no image: {contents(folder)}")
    return found
