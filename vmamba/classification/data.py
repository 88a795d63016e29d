"""Batches of images: transforms, mixing, and loaders whose every draw is a function of seed, epoch and index.

Nothing is drawn from the state of a generator that goes on from image to image, so that any number of worker
processes and of training processes, and a run that was stopped and resumed, sees the same images.
"""

import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from yacs.config import CfgNode

from vmamba.classification.datasets import Source, open_dataset
from vmamba.config import image_size
from vmamba.data.images import UnreadableImage
from vmamba.errors import UserError

logger = logging.getLogger(__name__)

Key = tuple[int, int]  # epoch, index of the image
Example = tuple[Tensor | None, int, list[str]] | str  # image (C, H, W), label, the unreadable; or what stops the run
Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), float32; labels (B,), int64

_ORDER, _IMAGE, _MIXUP = range(3)  # independent streams of random numbers
_REPLACEMENTS = 10  # images tried in the place of an unreadable one
_SMALL = 32  # up to this size pixels are too few to zoom into


def build_train_loader(config: CfgNode, *, rank: int, world_size: int) -> "TrainLoader":
    """The training images in micro-batches.

    Raises UserError when the data is not there, does not fit the config, or does not fill one batch.
    """
    source = open_dataset(config, training=True, rank=rank, world_size=world_size)
    return TrainLoader(config, source, rank, world_size)


def build_eval_loader(config: CfgNode, *, rank: int, world_size: int) -> "Loader":
    """This process's share of the validation images: over all processes each comes exactly once, without padding."""
    source = open_dataset(config, training=False, rank=rank, world_size=world_size)
    mine, size = range(rank, len(source), world_size), config.DATA.BATCH_SIZE
    batches = [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]
    return Loader(config, Examples(config, source, training=False), batches)


def build_mixup(config: CfgNode) -> Callable[..., Batch] | None:
    """None when mixup and cutmix are off, else mix(images, labels, step=...) -> images, soft labels (B, classes).

    What is drawn depends on (SEED, step) only.  Mixes `images` in place.
    """
    aug = config.AUG
    if not (aug.MIXUP or aug.CUTMIX or aug.CUTMIX_MINMAX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise UserError(
            f"mixup and cutmix pair the images of a batch, but DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}; "
            "make it even, or set AUG.MIXUP 0 and AUG.CUTMIX 0"
        )
    cut = aug.CUTMIX_MINMAX
    if cut is not None and not (len(cut) == 2 and 0 <= cut[0] < cut[1] <= 1):
        raise UserError(f"AUG.CUTMIX_MINMAX is {cut}; expected [smallest, largest] share of a side, such as [0.2, 0.8]")
    mixup = Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=cut,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )

    def mix(images: Tensor, labels: Tensor, *, step: int) -> Batch:
        with preserved_generators():
            seed_generators(config.SEED, _MIXUP, step)
            return mixup(images, labels)

    return mix


# ------------------------------------------------------------------------------------------------ loaders


class Loader:
    """Iterates over (images, labels).  A UserError met in a worker process is raised here, as one sentence.

    `skipped` counts the unreadable images this process met since the iteration began (DATA.SKIP_BAD_IMAGES).
    """

    def __init__(self, config: CfgNode, examples: "Examples", batches: Iterable[list[Key]]):
        data = config.DATA
        self.num_classes: int = config.MODEL.NUM_CLASSES
        self.skipped = 0
        self._named: set[str] = set()
        self._loader = DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=data.NUM_WORKERS,
            persistent_workers=data.NUM_WORKERS > 0,
            pin_memory=data.PIN_MEMORY and config.DEVICE != "cpu" and torch.cuda.is_available(),
            generator=torch.Generator(),  # else starting an iteration draws from PyTorch's global generator
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = 0
        for batch in self._loader:
            if isinstance(batch, str):
                raise UserError(batch)
            images, labels, unreadable = batch
            self._count(unreadable)
            if len(labels):
                yield images, labels

    def _count(self, unreadable: list[str]) -> None:
        self.skipped += len(unreadable)
        for sentence in unreadable:
            if sentence not in self._named:
                self._named.add(sentence)
                logger.warning("skipped an image: %s", sentence)


class TrainLoader(Loader):
    """Yields ACCUMULATION_STEPS micro-batches an optimiser step, from the step that `set_epoch` names.

    The images of step s are those at s*G to (s+1)*G of the epoch's permutation, G being the global batch.
    """

    def __init__(self, config: CfgNode, source: Source, rank: int, world_size: int):
        self._batches = TrainingBatches(config, len(source), rank, world_size)
        self.steps_per_epoch: int = self._batches.steps
        super().__init__(config, Examples(config, source, training=True), self._batches)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration run through `epoch` from optimiser step `start_step`."""
        self._batches.epoch, self._batches.start = epoch, start_step


class TrainingBatches:
    """The keys of one process's micro-batches."""

    def __init__(self, config: CfgNode, images: int, rank: int, world_size: int):
        self.seed, self.images, self.rank, self.world_size = config.SEED, images, rank, world_size
        self.micro, self.accumulation = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
        self.epoch = self.start = 0
        total = self.micro * world_size * self.accumulation
        self.steps = images // total
        if not self.steps:
            raise UserError(
                f"{images} training images do not fill one batch of {total} = DATA.BATCH_SIZE {self.micro} x "
                f"{world_size} processes x TRAIN.ACCUMULATION_STEPS {self.accumulation}; choose a smaller --batch-size"
            )

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        order = permutation(self.seed, self.epoch, self.images).tolist()
        for number in range(self.start * self.accumulation, self.steps * self.accumulation):
            first = (number * self.world_size + self.rank) * self.micro
            yield [(self.epoch, index) for index in order[first : first + self.micro]]


class Examples(Dataset):
    """Transformed images by (epoch, index), a batch at a time."""

    def __init__(self, config: CfgNode, source: Source, training: bool):
        self.source, self.training = source, training
        self.seed, self.channels, self.classes = config.SEED, config.MODEL.IN_CHANS, config.MODEL.NUM_CLASSES
        self.skip = config.DATA.SKIP_BAD_IMAGES
        self.transform = build_transform(config, training)

    def __getitems__(self, keys: list[Key]) -> list[Example]:
        """What DataLoader calls for a batch.  Keeping the generators' states is dear, so it is done once here."""
        with preserved_generators():
            return [self._example(key) for key in keys]

    def _example(self, key: Key) -> Example:
        """An error is a value here: raised in a worker process it would arrive wrapped in a traceback."""
        seed_generators(self.seed, _IMAGE, *key)
        unreadable = []
        for index in self._candidates(key[1]):
            try:
                image, label = self.source.load(index, self.channels)
            except UnreadableImage as error:
                if not self.skip:
                    return f"{error}; mend or remove it, or set DATA.SKIP_BAD_IMAGES true"
                unreadable.append(str(error))
                continue
            if not 0 <= label < self.classes:
                name = self.source.name(index)
                return f"label {label} of '{name}' is out of range; MODEL.NUM_CLASSES is {self.classes}"
            return self.transform(image), label, unreadable
        if self.training:
            return f"{len(unreadable)} images in a row are unreadable, at last: {unreadable[-1]}; check the data path"
        return None, -1, unreadable

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        for _ in range(_REPLACEMENTS if self.training else 0):  # a training batch keeps its size
            yield random.randrange(len(self.source))


def collate(examples: list[Example]) -> tuple[Tensor, Tensor, list[str]] | str:
    """A batch with the unreadable images of its examples, or the first error among them."""
    for example in examples:
        if isinstance(example, str):
            return example
    kept = [(image, label) for image, label, _ in examples if image is not None]
    images = torch.stack([image for image, _ in kept]) if kept else torch.empty(0)
    return images, torch.tensor([label for _, label in kept]), [bad for *_, names in examples for bad in names]


# ------------------------------------------------------------------------------------------------ random numbers


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the states of Python's, NumPy's and PyTorch's CPU generators back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_generators(*key: int) -> None:
    """Seed the three from `key`."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(_integer(words))  # torch.manual_seed would seed the GPUs too


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of an epoch's images (length,)."""
    words = np.random.SeedSequence((seed, _ORDER, epoch)).generate_state(4)
    return torch.randperm(length, generator=torch.Generator().manual_seed(_integer(words)))


def _integer(words: np.ndarray) -> int:
    return int(words[0]) << 32 | int(words[1])


# ------------------------------------------------------------------------------------------------ transforms


def build_transform(config: CfgNode, training: bool) -> Callable[[Image.Image], Tensor]:
    """timm's transform from an image to (IN_CHANS, H, W) float32.

    For training at up to 32 pixels the image is resized, padded by an eighth and cropped, instead of zoomed into.
    """
    size, channels, aug = image_size(config), config.MODEL.IN_CHANS, config.AUG
    if channels not in (1, 3):
        raise UserError(f"MODEL.IN_CHANS is {channels}; images are loaded as grayscale (1) or RGB (3)")
    small = max(size) <= _SMALL
    common = {
        "input_size": (channels, *size),
        "interpolation": config.DATA.INTERPOLATION,
        "mean": _by_channel(config, "MEAN"),
        "std": _by_channel(config, "STD"),
    }
    if not training:
        whole = small or not config.TEST.CROP
        return create_transform(
            **common, crop_pct=1.0 if whole else 224 / 256, crop_mode="center" if config.TEST.CROP else "squash"
        )
    try:
        transform = create_transform(
            **common,
            is_training=True,
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=_checked_policy(aug.AUTO_AUGMENT),
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"timm does not know AUG.AUTO_AUGMENT '{aug.AUTO_AUGMENT}': {error}") from error
    _let_posterize_take_zero_bits(transform)
    if small:
        mode = transforms.InterpolationMode(config.DATA.INTERPOLATION)
        padded = transforms.RandomCrop(size, padding=(size[1] // 8, size[0] // 8))
        transform.transforms[0:1] = [transforms.Resize(size, interpolation=mode), padded]
    return transform


def _by_channel(config: CfgNode, key: str) -> tuple[float, ...]:
    values, channels = config.DATA[key], config.MODEL.IN_CHANS
    if len(values) not in (1, channels):
        raise UserError(f"DATA.{key} is {values}; expected one number, or one for each of MODEL.IN_CHANS {channels}")
    return tuple(values) * (channels // len(values))


def _checked_policy(policy: str | None) -> str | None:
    """timm passes over a part it does not understand."""
    if policy is not None and not re.fullmatch(
        r"(rand|augmix|original|originalr|v0|v0r|3a)(-t\w+|-[a-z]+[\d.]+)*", policy
    ):
        raise ValueError("expected a policy with its numbers, such as rand-m9-mstd0.5-inc1, or null")
    return policy


def _let_posterize_take_zero_bits(transform: transforms.Compose) -> None:
    """timm posterizes to 0 bits now and then, which Pillow 13 refuses; it used to give a black image."""
    for step in transform.transforms:
        for operations in [getattr(step, "ops", []), *getattr(step, "policy", [])]:
            for operation in operations:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    if bits == 0:
        return image.point(lambda value: 0)
    return ImageOps.posterize(image, min(bits, 8))
