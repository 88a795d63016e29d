"""Images with boxes and masks of their objects, by index: COCO's files and those of its form, and scenes made here."""

import logging
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from faster_coco_eval.core import mask as run_lengths
from PIL import Image
from yacs.config import CfgNode

from vmamba.data import scenes
from vmamba.data.folders import contents, data_path, what_is
from vmamba.data.images import decode
from vmamba.data.names import checksum
from vmamba.detection.annotations import ImageEntry, as_run_lengths, read_annotations
from vmamba.errors import UserError
from vmamba.text import counted, printable

logger = logging.getLogger("vmamba")


@dataclass(frozen=True)
class Sample:
    image: Image.Image  # RGB
    boxes: np.ndarray  # (N, 4) float32: x1, y1, x2, y2 in pixels
    labels: np.ndarray  # (N,) int64, from 0
    masks: np.ndarray  # (N, H, W) uint8
    image_id: int


def without_objects(image: Image.Image, image_id: int) -> Sample:
    masks = np.zeros((0, image.height, image.width), np.uint8)
    return Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), masks, image_id)


class Dataset(Protocol):
    categories: list[tuple[int, str]]  # number in the file and name of label 0, 1, ...
    shapes: list[tuple[int, int]]  # (height, width) of each image

    def __len__(self) -> int: ...

    def load(self, index: int) -> Sample:
        """Held out, without objects: those are in `truth`."""

    def truth(self) -> dict[str, Any]:
        """COCO's form of what is to be found."""


class Coco:
    """Images of a folder with a file of annotations; to train on, those that show an object.

    Of an image with more than DATA.MOST_OBJECTS objects as many are drawn, so that memory is bounded.
    Raises UserError where folder or file is missing or wrong, and where the classes are not MODEL.NUM_CLASSES.
    """

    def __init__(self, config: CfgNode, training: bool, tell: bool):
        data, split = config.DATA, "TRAIN" if training else "VAL"
        root = data_path(config)
        for kind, key in (("folder", f"{split}_IMAGES"), ("file", f"{split}_ANNOTATIONS")):
            if what_is(root / data[key]) != kind:
                raise UserError(
                    f"data path '{printable(root)}' has no {kind} '{printable(data[key])}', as DATA.{key} says: "
                    f"{contents(root)}"
                )
        self.folder, self.file = root / data[f"{split}_IMAGES"], root / data[f"{split}_ANNOTATIONS"]
        found, _ = read_annotations(self.file)
        self.categories, self.most = list(found.categories), data.MOST_OBJECTS
        if len(self.categories) != config.MODEL.NUM_CLASSES:
            raise UserError(
                f"'{printable(self.file)}' has {counted(len(self.categories), 'category', 'categories')}, but "
                f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}; add --opts MODEL.NUM_CLASSES {len(self.categories)}"
            )
        images, reasons = list(found.images), Counter(found.left_out)
        if training:
            images = [each for each in images if each.instances and min(each.height, each.width) >= data.LEAST_SIDE]
            reasons["images without an object or below DATA.LEAST_SIDE"] = len(found.images) - len(images)
        if not any(each.instances for each in images):
            raise UserError(
                f"'{printable(self.file)}' has no image{' to train on' * training} with an object"
                f"{_left_out(reasons)}; there is nothing to learn from it, nor to find"
            )
        if tell and any(reasons.values()):
            logger.info(f"'{printable(self.file)}': {counted(len(images), 'image')}{_left_out(reasons)}")
        if not training:
            images = [replace(each, instances=()) for each in images]
        self.shapes = [(each.height, each.width) for each in images]
        # As bytes, or every loading process would copy a million objects as it counts who refers to them.
        self.images = [pickle.dumps(each) for each in images]

    @property
    def class_names(self) -> list[str]:
        return [name for _, name in self.categories]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return printable(self.folder / pickle.loads(self.images[index]).file)

    def contents(self) -> dict[str, str]:
        """For `Loader.contents`."""
        return {"checksum": checksum([pickle.loads(each).file for each in self.images])}

    def load(self, index: int) -> Sample:
        entry: ImageEntry = pickle.loads(self.images[index])
        path = self.folder / entry.file
        image = decode(path, 3, path)
        if (image.height, image.width) != (entry.height, entry.width):
            raise UserError(
                f"'{printable(path)}' is {image.width} x {image.height} pixels, and '{printable(self.file)}' says "
                f"{entry.width} x {entry.height}; mend whichever is wrong"
            )
        instances = entry.instances
        if len(instances) > self.most:
            chosen = np.random.choice(len(instances), self.most, replace=False)
            instances = [instances[number] for number in sorted(chosen)]
        masks = [each.bitmap(entry.height, entry.width) for each in instances]
        return Sample(
            image,
            np.array([each.box for each in instances], np.float32).reshape(-1, 4),
            np.array([each.label for each in instances], np.int64),
            np.array(masks, np.uint8).reshape(-1, entry.height, entry.width),
            entry.id,
        )

    def truth(self) -> dict[str, Any]:
        """The file's content with what other tools may leave out, and numbers of annotations from 1: pycocotools takes
        an object of number 0 for one that nothing has found."""
        found, content = read_annotations(self.file)
        shapes = {each.id: (each.height, each.width) for each in found.images}
        annotations = []
        for number, each in enumerate(content["annotations"], 1):
            annotations.append(each | {"id": number, "iscrowd": int(each.get("iscrowd", 0))})
            if "area" not in each:
                mask = as_run_lengths(each["segmentation"], *shapes[each["image_id"]])
                annotations[-1]["area"] = float(run_lengths.area(mask))
        return content | {"annotations": annotations}


class Scenes:
    """Scenes of digits, DATA.SCENE_SIDE pixels wide."""

    def __init__(self, config: CfgNode, training: bool):
        self.training, self.count, self.side = training, config.DATA.SCENES[not training], config.DATA.SCENE_SIDE
        self.categories = list(enumerate(scenes.CLASSES, 1))
        self.shapes = [(self.side, self.side)] * self.count
        if len(self.categories) != config.MODEL.NUM_CLASSES:
            raise UserError(
                f"scenes have {len(self.categories)} classes, and MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}"
            )

    @property
    def class_names(self) -> list[str]:
        return [name for _, name in self.categories]

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Sample:
        made = scenes.scene(index, self.training, self.side)
        if not self.training:
            return without_objects(made.image, index)
        return Sample(made.image, made.boxes(), made.labels, made.masks.astype(np.uint8), index)

    def truth(self) -> dict[str, Any]:
        images = [{"id": index, "height": self.side, "width": self.side} for index in range(self.count)]
        annotations: list[dict[str, Any]] = []
        for index in range(self.count):
            made = scenes.scene(index, self.training, self.side)
            for box, label, mask in zip(made.boxes().tolist(), made.labels.tolist(), made.masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label + 1,
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": run_lengths.encode(np.asfortranarray(mask.astype(np.uint8))),
                    }
                )
        categories = [{"id": number, "name": name} for number, name in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


def _left_out(reasons: Mapping[str, int]) -> str:
    """In words, for the end of a clause; empty where nothing is."""
    told = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.items() if count)
    return f", left out: {told}" if told else ""


def open_dataset(config: CfgNode, training: bool, tell: bool = False) -> Dataset:
    """`tell`: say in the log what is left out."""
    return Scenes(config, training) if config.DATA.DATASET == "scenes" else Coco(config, training, tell)
