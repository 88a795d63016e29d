"""The images of a detection in batches: what `MaskRCNN` is called with, by its names; see `transforms.Collate`."""

from yacs.config import CfgNode

from vmamba.data.loaders import EvalLoader, Examples, TrainLoader
from vmamba.detection.datasets import Dataset, open_dataset
from vmamba.detection.transforms import Collate, Transform


def build_train_loader(config: CfgNode, *, rank: int, world_size: int) -> TrainLoader:
    """The training images in micro-batches of upright or wide ones (DATA.GROUP_BY_ASPECT).

    Raises UserError when the data is not there, does not fit the config, or does not fill one batch.
    """
    dataset = open_dataset(config, training=True, tell=rank == 0)
    if config.DATA.GROUP_BY_ASPECT:
        dataset.groups = [int(height > width) for height, width in dataset.shapes]
    examples = Examples(config, dataset, Transform(config, training=True), training=True)
    return TrainLoader(config, examples, rank, world_size, Collate(config.DATA.DIVISOR))


def build_eval_loader(config: CfgNode, dataset: Dataset, *, rank: int, world_size: int) -> EvalLoader:
    """This process's share of the held-out images."""
    examples = Examples(config, dataset, Transform(config, training=False), training=False)
    return EvalLoader(config, examples, rank, world_size, Collate(config.DATA.DIVISOR))
