"""The images of a detection in batches: what `MaskRCNN` is called with, by its names; see `transforms.Collate`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from yacs.config import CfgNode

from vmamba.data.loaders import EvalLoader, Examples, TrainLoader
from vmamba.detection.datasets import Dataset, open_dataset
from vmamba.detection.transforms import Collate, Example, Transform
from vmamba.errors import UserError
from vmamba.text import printable


def build_train_loader(config: CfgNode, held_out: Dataset, *, rank: int, world_size: int) -> TrainLoader:
    """The training images in micro-batches of upright or wide ones (DATA.GROUP_BY_ASPECT).

    Raises UserError when the data is not there, does not fit the config, does not fill one batch, or has other
    categories than what is held out.
    """
    dataset = open_dataset(config, training=True, tell=rank == 0)
    for one, other in zip(dataset.categories, held_out.categories, strict=True):
        if one != other:
            raise UserError(
                f"the training images have category {one[0]} '{printable(one[1])}' where those held out have "
                f"{other[0]} '{printable(other[1])}'; both files of annotations must list the same"
            )
    if config.DATA.GROUP_BY_ASPECT:
        dataset.groups = [int(height > width) for height, width in dataset.shapes]
    examples = Examples(config, dataset, Transform(config, training=True), training=True)
    return TrainLoader(config, examples, rank, world_size, Collate(config.DATA.DIVISOR))


def build_eval_loader(config: CfgNode, dataset: Dataset, *, rank: int, world_size: int) -> EvalLoader:
    """This process's share of the held-out images, in lists of what `Collate` makes of each by itself: among others an
    image would be padded further, which its predictions depend on."""
    examples = Examples(config, dataset, Transform(config, training=False), training=False)
    return EvalLoader(config, examples, rank, world_size, partial(_one_by_one, Collate(config.DATA.DIVISOR)))


def _one_by_one(collate: Collate, examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [collate([each]) for each in examples]
