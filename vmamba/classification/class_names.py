"""What the classes of a classifier's data are called."""

import logging
from pathlib import Path

from yacs.config import CfgNode

from vmamba.classification.class_maps import IMAGENET, called
from vmamba.classification.elpv import GRADES
from vmamba.classification.label_files import classes_of, read_labels
from vmamba.config import restored
from vmamba.data import scenes
from vmamba.data.folders import LeftOut, listing, what_is
from vmamba.errors import UserError
from vmamba.models.pretrained import Checkpoint, calls_otherwise

logger = logging.getLogger("vmamba")


def names_of(config: CfgNode) -> list[str]:
    """Of each class by its number, as a config's data tells them today, for checkpoints that do not; none where nothing
    does."""
    data, classes = config.DATA, config.MODEL.NUM_CLASSES
    if data.DATASET == "digits":
        return list(scenes.CLASSES)
    if data.DATASET == "elpv":
        return list(GRADES)
    if data.DATASET != "imagenet":
        return []
    if data.TRAIN_LABELS:
        return called(_listed(Path(data.DATA_PATH, data.TRAIN_LABELS), Path(data.DATA_PATH)))
    if classes == 1000 and not data.DATA_PATH:  # of released weights
        return called(IMAGENET)
    places = [Path(data.DATA_PATH, split) for split in ("train", "val", *([""] if data.VAL_FRACTION else []))]
    folder = next((place for place in places if data.DATA_PATH and what_is(place) == "folder"), None)
    return called(listing(folder, LeftOut())[0]) if folder else []


def warn_of_other_names(checkpoint: Checkpoint, config: CfgNode) -> None:
    """Where a checkpoint of as many classes and a config's data both tell what they are called, and it is not the same:
    a class's number would mean another one."""
    ours, theirs = names_of(config), list(checkpoint.classes) or _names_of_run(checkpoint)
    other = calls_otherwise(checkpoint.path, theirs, ours)
    if other and not config.DATA.CLASS_MAP:
        logger.warning(other)


def _names_of_run(checkpoint: Checkpoint) -> list[str]:
    """What the data of the run that wrote a checkpoint calls them, where it lies there still."""
    try:
        its = restored(checkpoint.config, f"the config in '{checkpoint.path}'") if checkpoint.config else None
        return names_of(its) if its and its.TASK == "classification" else []
    except UserError:  # of another program's config, or of data that has gone: nothing is told
        return []


def _listed(file: Path, root: Path) -> list[str]:
    """The classes of a file of labels; none where it has gone."""
    try:
        return classes_of(read_labels(file, root, check=False))
    except UserError:
        return []
