"""The images of a segmentation in batches."""

from yacs.config import CfgNode

from vmamba.data.loaders import EvalLoader, Examples, TrainLoader
from vmamba.segmentation.datasets import open_dataset
from vmamba.segmentation.transforms import EvalTransform, TrainTransform


def build_train_loader(config: CfgNode, *, rank: int, world_size: int) -> TrainLoader:
    """Batches (B, 3, h, w) float32 and (B, h, w) int64.

    Raises UserError when the data is not there, does not fit the config, or does not fill one batch.
    """
    examples = Examples(
        config, open_dataset(config, training=True, tell=rank == 0), TrainTransform(config), training=True
    )
    return TrainLoader(config, examples, rank, world_size)


def build_eval_loader(config: CfgNode, *, rank: int, world_size: int) -> EvalLoader:
    """This process's share of the held-out images: lists of what `EvalTransform` makes, each image by itself.

    Raises UserError when they are not there or do not fit.
    """
    examples = Examples(
        config, open_dataset(config, training=False, tell=rank == 0), EvalTransform(config), training=False
    )
    return EvalLoader(config, examples, rank, world_size, collate=list)
