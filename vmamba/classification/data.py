"""The images of a classification in batches: what `transforms.collate` makes, which `loader.finish` normalises where
it is computed with."""

from collections import Counter
from collections.abc import Callable
from numbers import Integral

from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from vmamba.classification.class_maps import called
from vmamba.classification.datasets import open_dataset
from vmamba.classification.nvjpeg import Decoder, Encoded, decode_later
from vmamba.classification.source import Source
from vmamba.classification.transforms import Normalise, Pixels, build_pixels, collate
from vmamba.data.draws import permutation
from vmamba.data.images import check_decoder, decode, decode_pixels
from vmamba.data.loaders import EvalLoader, Examples, Order, TrainLoader
from vmamba.data.sampling import balanced, repeated
from vmamba.errors import UserError

Place = tuple[int, int]  # which of its machine's processes this is, and how many there are


def build_train_loader(config: CfgNode, *, rank: int, world_size: int, on_machine: Place = (0, 1)) -> TrainLoader:
    """The training images in micro-batches.

    Raises UserError when the data is not there, does not fit the config, or does not fill one batch.
    """
    images = _images(config, True, rank, on_machine)
    examples = Examples(config, images, OnImage(build_pixels(config, True)), training=True)
    order, deal = _order(config, images), config.AUG.REPEATS > 1
    return TrainLoader(config, examples, rank, world_size, collate, _finish(config), order, deal)


def _order(config: CfgNode, images: "LabelledImages") -> Order | None:
    """What DATA.SAMPLER and AUG.REPEATS make of an epoch; None for a permutation.  Raises UserError where no labels
    tell what is balanced."""
    is_balanced, repeats = config.DATA.SAMPLER == "balanced", config.AUG.REPEATS
    if not is_balanced and repeats == 1:
        return None
    labels = images.labels() if is_balanced else None
    if is_balanced and labels is None:
        raise UserError(
            f"DATA.SAMPLER is balanced, and DATA.DATASET '{config.DATA.DATASET}' tells labels with images only; set it "
            "to shuffled"
        )

    def order(epoch: int) -> list[int]:
        if labels is None:
            shown = permutation(config.SEED, epoch, len(images)).tolist()
        else:
            shown = balanced(config.SEED, epoch, labels, -(-len(images) // repeats))
        return repeated(shown, repeats, len(images))

    return order


def build_eval_loader(
    config: CfgNode, *, rank: int, world_size: int, on_machine: Place = (0, 1), split: str = "val"
) -> EvalLoader:
    """This process's share of the validation images, or, with `split` "train", of the training images as evaluation
    sees images.  Raises UserError when they are not there or do not fit."""
    images = _images(config, split == "train", rank, on_machine)
    examples = Examples(config, images, OnImage(build_pixels(config, False)), training=False)
    return EvalLoader(config, examples, rank, world_size, collate, _finish(config))


def _finish(config: CfgNode) -> Normalise:
    return Normalise(config, Decoder(config) if config.DATA.DECODE == "nvjpeg" else None)


def _images(config: CfgNode, training: bool, rank: int, on_machine: Place) -> "LabelledImages":
    return LabelledImages(config, open_dataset(config, training=training, rank=rank, on_machine=on_machine))


class LabelledImages:
    """A data set's images with labels that the model has classes for."""

    def __init__(self, config: CfgNode, source: Source):
        self.source, self.channels, self.classes = source, config.MODEL.IN_CHANS, config.MODEL.NUM_CLASSES
        self.root = config.DATA.DATA_PATH
        self.decode = {"pillow": decode, "torchvision": decode_pixels, "nvjpeg": decode_later}[config.DATA.DECODE]
        if config.DATA.DECODE != "pillow":
            check_decoder()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def load(self, index: int) -> tuple[Image.Image | Tensor | Encoded, int]:
        """Raises UnreadableImage, and UserError for a label out of range."""
        image, label = self.source.load(index, self.channels, self.decode)
        if not 0 <= label < self.classes:
            name = self.source.name(index)
            raise UserError(f"label {label} of '{name}' is out of range; MODEL.NUM_CLASSES is {self.classes}")
        return image, label

    def contents(self) -> dict[str, str]:
        return self.source.contents(self.root)

    @property
    def class_names(self) -> list[str]:
        return called(self.source.classes)

    def class_counts(self) -> list[int] | None:
        """Of each class its images; None where only reading every image would tell."""
        labels = self.labels()
        if labels is None:
            return None
        counts = Counter(labels)
        return [counts[label] for label in range(self.classes)]

    def labels(self) -> list[int] | None:
        """Of all images; None where only reading every image would tell.  Raises UserError where what a data set tells
        are not the model's classes, one of each image."""
        found = self.source.labels()
        if found is None:
            return None
        found = found.tolist() if hasattr(found, "tolist") else list(found)
        wrong = [label for label in found if not (isinstance(label, Integral) and 0 <= label < self.classes)]
        if wrong or len(found) != len(self):
            what = f"the first that is not is {wrong[0]!r:.40}" if wrong else f"there are {len(found):,}"
            raise UserError(
                f"the targets that the data set tells must be numbers from 0 to {self.classes - 1}, one for each of "
                f"its {len(self):,} images, and {what}; mend its targets, or leave them out"
            )
        return [int(label) for label in found]


class OnImage:
    """A transform of the image of (image, label)."""

    def __init__(self, transform: Callable[[Image.Image | Tensor | Encoded], Pixels]):
        self.transform = transform

    def __call__(self, sample: tuple[Image.Image | Tensor | Encoded, int]) -> tuple[Pixels, int]:
        image, label = sample
        return self.transform(image), label
