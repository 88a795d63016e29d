"""What the classes of a data set are called."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from yacs.config import CfgNode

from vmamba.classification.class_names import names_of
from vmamba.data import scenes
from vmamba.data.folders import what_is
from vmamba.detection.annotations import read_annotations
from vmamba.errors import UserError
from vmamba.text import printable

logger = logging.getLogger("vmamba")
# The 150 classes of ADE20K's scene parsing, in the order of their numbers.
ADE20K = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
    chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
    case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
    hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane,
    dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
    fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
    screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag""".replace("\n    ", " ").split(", ")
)


def class_names(config: CfgNode) -> list[str]:
    """A name for each class of a config's data, "class 3" where nothing tells them."""
    classes = config.MODEL.NUM_CLASSES
    names = _KNOWN[config.TASK](config)
    return names if len(names) == classes else [f"class {number}" for number in range(classes)]


def category_numbers(config: CfgNode, names: Sequence[str]) -> list[int]:
    """Of a detector's classes those of its data's file, as `results.json` has them; from 0, and a warning, where
    nothing tells them, as where the file that lies there today has other `names`."""
    known = _categories(config)
    if [name for _, name in known] == list(names):
        return [number for number, _ in known]
    file = printable(Path(config.DATA.DATA_PATH, config.DATA.VAL_ANNOTATIONS))
    logger.warning(
        f"the numbers of the model's categories are not known: '{file}' is not there, or has other categories; "
        "category_id counts from 0"
    )
    return list(range(config.MODEL.NUM_CLASSES))


def _detection(config: CfgNode) -> list[str]:
    return [name for _, name in _categories(config)]


def _categories(config: CfgNode) -> list[tuple[int, str]]:
    """Number and name of each class of a detector's data; empty where nothing tells them."""
    data = config.DATA
    if data.DATASET == "scenes":
        return list(enumerate(scenes.CLASSES, 1))
    file = Path(data.DATA_PATH, data.VAL_ANNOTATIONS)
    if data.DATA_PATH and what_is(file) == "file":
        try:
            return list(read_annotations(file)[0].categories)
        except UserError:
            return []
    if config.MODEL.NUM_CLASSES == 80 and _COCO.fullmatch(Path(data.VAL_ANNOTATIONS).name):
        known = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # in the places of COCO's numbers
        return [(number, name) for number, name in enumerate(known) if name not in _NO_CLASS]
    return []


def _segmentation(config: CfgNode) -> list[str]:
    if config.DATA.DATASET == "scenes":
        return ["background", *scenes.CLASSES]
    return list(ADE20K) if config.DATA.DATASET == "ade20k" else []


_COCO = re.compile(r"instances_(train|val)20\d\d\.json")
_NO_CLASS = ("__background__", "N/A")  # numbers that COCO leaves out
_KNOWN = {"classification": names_of, "detection": _detection, "segmentation": _segmentation}
