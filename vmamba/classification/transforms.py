"""What becomes of an image before the model sees it: timm's transforms, mixup and cutmix.

A loading process makes pixels of 8 bits of it, a quarter of what they are as float32, and draws what random erasing
puts into them; the device that computes takes off the mean and puts the patches in.  The numbers are timm's, bit for
bit.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor, resized_crop
from yacs.config import CfgNode

from vmamba.classification.nvjpeg import (
    FILTERS,
    CutLong,
    Decoder,
    Encoded,
    Later,
    check_steps,
    draw_crop,
    gather_files,
    resized_size,
)
from vmamba.classification.on_device import Augment, Operation, in_passes, write_down
from vmamba.config import image_size
from vmamba.config.keys import keys_of
from vmamba.data.draws import MIXUP, preserved_generators, seed_generators
from vmamba.data.images import COLOURS
from vmamba.errors import UserError

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), float32; labels (B,), int64, or soft (B, classes)
_OF_TENSORS = ("nearest", "bilinear", "bicubic")  # filters that resize tensors
_SMALL = 32  # up to this size pixels are too few to zoom into


@dataclass(frozen=True)
class Patch:
    """What random erasing puts into an image, its mean and standard deviation taken off."""

    top: int
    left: int
    values: Tensor  # (C, h, w) float32


class Pixels(NamedTuple):
    """What a loading process makes of an image."""

    values: Tensor | Later  # (C, H, W) uint8
    operations: Sequence[Operation] = ()  # what is still to be done to them
    patches: Sequence[Patch] = ()  # what is put into them then


def build_transform(config: CfgNode, training: bool) -> Callable[[Image.Image | Tensor], Tensor]:
    """timm's transform from an image to (IN_CHANS, H, W) float32: of one image what a run does by batches."""
    to_pixels, normalise = build_pixels(config, training), Normalise(config)
    of_tensors = config.DATA.DECODE != "pillow"

    def transform(image: Image.Image | Tensor) -> Tensor:
        image = pil_to_tensor(image) if of_tensors else image
        return normalise(collate([(to_pixels(image), 0)]))[0][0]

    return transform


def build_pixels(config: CfgNode, training: bool) -> Callable[[Any], Pixels]:
    """The part of timm's transform that a loading process does, of an image as DATA.DECODE gives it: Pillow's; or a
    tensor, of which it does the crop and leaves the rest to `Normalise`; or a file, of which it draws the crop.

    For training at up to 32 pixels the image is resized, padded by an eighth and cropped, instead of zoomed into.
    """
    size, channels, aug = image_size(config), config.MODEL.IN_CHANS, config.AUG
    if channels not in COLOURS:
        _check_bands(config, training)
    small = max(size) <= _SMALL
    common = {
        "input_size": (channels, *size),
        "interpolation": config.DATA.INTERPOLATION,
        "mean": _by_channel(config, "MEAN"),  # of what policies fill corners with
        "normalize": False,
    }
    if not training:
        whole = small or not config.TEST.CROP
        crop_pct = 1.0 if whole else config.TEST.CROP_PCT
        crop_mode = "center" if config.TEST.CROP else "squash"
        transform = create_transform(**common, crop_pct=crop_pct, crop_mode=crop_mode)
        if config.TEST.CROP:
            transform.transforms.insert(0, CutLong(size))
        return _by_decoder(config, transform, crop_steps=len(transform.transforms) - 1)
    try:
        transform = create_transform(
            **common,
            is_training=True,
            scale=tuple(aug.SCALE),
            ratio=tuple(aug.RATIO),
            hflip=aug.HFLIP,
            vflip=aug.VFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=_checked_policy(aug.AUTO_AUGMENT),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"timm does not know AUG.AUTO_AUGMENT '{aug.AUTO_AUGMENT}': {error}") from error
    let_posterize_take_zero_bits(transform)
    if small:
        mode = transforms.InterpolationMode(config.DATA.INTERPOLATION)
        padded = RandomCrop(size, padding=(size[1] // 8, size[0] // 8))
        transform.transforms[0:1] = [transforms.Resize(size, interpolation=mode), padded]
    erasing = RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device="cpu") if aug.REPROB else None
    return _by_decoder(config, transform, crop_steps=2 if small else 1, erasing=erasing)


def without_effect(config: CfgNode, training: bool) -> list[str]:
    """A sentence for each key of the transform that says other than its default and does nothing at this size, or
    without TEST.CROP."""
    known, small = keys_of(config.TASK), max(image_size(config)) <= _SMALL
    why = f"at DATA.IMG_SIZE {config.DATA.IMG_SIZE}: up to {_SMALL} pixels images are "
    reasons = {}
    if training and small:
        reasons = dict.fromkeys(("AUG.SCALE", "AUG.RATIO"), f"{why}padded and cropped, not zoomed into")
    elif not training and not config.TEST.CROP:
        reasons = {"TEST.CROP_PCT": "where TEST.CROP is false"}
    elif not training and small and config.TEST.CROP_PCT != 1:
        reasons = {"TEST.CROP_PCT": f"{why}evaluated whole"}
    values = {key: config[key.partition(".")[0]][key.partition(".")[2]] for key in reasons}
    return [
        f"{key} {values[key]} does nothing {reason}"
        for key, reason in reasons.items()
        if values[key] != known[key].default
    ]


class RandomCrop(transforms.RandomCrop):
    """torchvision's, with the same draws and pixels, of a padded image that is not made where it is Pillow's: what lies
    outside of one is zero in its own crop.  8.5 microseconds of a digit in place of 18.4 (docs/log.md)."""

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        if not isinstance(image, Image.Image):
            return super().forward(image)
        (across, down), (height, width) = self.padding, self.size
        beyond = image.height + 2 * down - height, image.width + 2 * across - width
        top, left = (int(torch.randint(0, most + 1, (1,))) for most in beyond) if any(beyond) else (0, 0)
        top, left = top - down, left - across
        return image.crop((left, top, left + width, top + height))


def _by_decoder(
    config: CfgNode, transform: transforms.Compose, crop_steps: int, erasing: RandomErasing | None = None
) -> Callable[[Any], Pixels]:
    """timm's `transform`, of which the first `crop_steps` make an image of the right size and the last a tensor."""
    way, first = config.DATA.DECODE, transform.transforms[0]
    if config.MODEL.IN_CHANS not in COLOURS and isinstance(first, RandomResizedCropAndInterpolation):
        transform.transforms[0] = _CropOfBands(first)
    if way == "pillow":
        return _ToPixels(transform, tuple, erasing)
    filters = FILTERS if way == "nvjpeg" else _OF_TENSORS
    if config.DATA.INTERPOLATION not in filters:
        raise UserError(
            f"DATA.INTERPOLATION is {config.DATA.INTERPOLATION}, which DATA.DECODE {way} does not do; choose one of "
            f"{', '.join(filters)}, or DATA.DECODE pillow"
        )
    steps = transform.transforms
    if way == "nvjpeg":
        check_steps(steps[:crop_steps])
    crop = _Crop(steps[:crop_steps], config.MODEL.IN_CHANS)
    return _ToPixels(crop, write_down(steps[crop_steps:-1], way), erasing)


def _check_bands(config: CfgNode, training: bool) -> None:
    """Raises UserError for what is known of gray and RGB images alone."""
    aug, channels = config.AUG, f"MODEL.IN_CHANS {config.MODEL.IN_CHANS}"
    settings = {"AUG.AUTO_AUGMENT": (aug.AUTO_AUGMENT, "null"), "AUG.COLOR_JITTER": (aug.COLOR_JITTER, 0)}
    for key, (value, off) in settings.items():
        if training and value:
            raise UserError(f"{key} is {value} and {channels}; colours are of 1 and 3 channels, so set {key} {off}")
    if config.DATA.DECODE != "pillow":
        raise UserError(
            f"DATA.DECODE is {config.DATA.DECODE}, and {channels}; set DATA.DECODE pillow, which reads .npy"
        )
    if config.DATA.INTERPOLATION not in _OF_TENSORS:
        known = ", ".join(_OF_TENSORS)
        raise UserError(f"DATA.INTERPOLATION is {config.DATA.INTERPOLATION}, and with {channels} it can be {known}")


class _ToPixels:
    """Crop, operations and erasing are drawn in this order, whoever does them."""

    def __init__(
        self,
        crop: Callable[[Any], Tensor | Later],
        draw: Callable[[], Sequence[Operation]],
        erasing: RandomErasing | None,
    ):
        self.crop, self.draw, self.erasing = crop, draw, erasing

    def __call__(self, image: Any) -> Pixels:
        values, operations, erased = self.crop(image), self.draw(), _Erased()
        if self.erasing:
            erased.shape = values.shape
            self.erasing(erased)
        return Pixels(values, operations, erased.patches)


class _Crop:
    """The first steps of timm's transform on a tensor (C, H, W), uint8, or drawn for a file."""

    def __init__(self, steps: Sequence[Callable], channels: int):
        self.steps, self.channels = steps, channels

    def __call__(self, image: Tensor | Encoded) -> Tensor | Later:
        if isinstance(image, Encoded):
            return draw_crop(self.steps, image, self.channels)
        for step in self.steps:
            if isinstance(step, RandomResizedCropAndInterpolation):
                top, left, height, width = step.get_params(image, step.scale, step.ratio)
                image = _resize(image[:, top : top + height, left : left + width], step.size, step.interpolation)
            elif isinstance(step, ResizeKeepRatio):
                image = _resize(image, step.get_params(image, step.size, step.longest), step.interpolation)
            elif isinstance(step, transforms.Resize):
                image = _resize(image, resized_size(step.size, *image.shape[1:]), step.interpolation)
            else:
                image = step(image)
        return image


def _resize(image: Tensor, size: Sequence[int], mode: transforms.InterpolationMode) -> Tensor:
    """With a low pass, each direction rounded to bytes as Pillow does; torchvision 0.21 rounds bilinear's once, after
    both, and takes four times as long.  Of no pixels it is black, as Pillow's: a crop of a tiny image may have none."""
    if 0 in image.shape:
        return image.new_zeros(len(image), *size)
    if mode == mode.NEAREST:
        rows, columns = map(_nearest, image.shape[1:], size)
        return image[:, rows[:, None], columns]
    return interpolate(image[None], tuple(size), mode=mode.value, antialias=True, align_corners=False)[0]


def _nearest(old: int, new: int) -> Tensor:
    """Of `new` pixels the nearest of `old`, added up as Pillow does it, which decides where two are as near."""
    step = old / new
    middles = np.cumsum([step / 2] + [step] * (new - 1))
    return torch.from_numpy(middles.astype(np.int64)).clamp(max=old - 1)


class _CropOfBands:
    """timm's random crop of a tensor, which may have no pixels, as in `_resize`."""

    def __init__(self, step: RandomResizedCropAndInterpolation):
        self.step = step

    def __call__(self, image: Tensor) -> Tensor:
        step = self.step
        place = step.get_params(image, step.scale, step.ratio)
        if 0 in place[2:]:
            return image.new_zeros(len(image), *step.size)
        return resized_crop(image, *place, step.size, step.interpolation)


class _Erased:
    """Stands for a float32 image while timm's RandomErasing writes into it, and keeps what is written."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.shape, self.patches = torch.Size(), []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        whole = values.expand(-1, rows.stop - rows.start, columns.stop - columns.start)
        self.patches.append(Patch(rows.start, columns.start, whole))


def collate(samples: Sequence[tuple[Pixels, int]]) -> dict[str, Any]:
    """Samples of (pixels, label) -> what `Normalise` takes: `images` (B, C, H, W), uint8; `labels` (B,), int64;
    `operations`, as `in_passes` lists them; `places`, of each patch (image, top, left, height, width); `patches`, the
    values of all of them in one row; and where the GPU shall decode images `files`, which are not among `images`."""
    each = [pixels for pixels, _ in samples]
    shape, later = (
        each[0].values.shape,
        [place for place, pixels in enumerate(each) if isinstance(pixels.values, Later)],
    )
    ready = [pixels.values for pixels in each if isinstance(pixels.values, Tensor)]
    patches = [(number, patch) for number, pixels in enumerate(each) for patch in pixels.patches]
    return {
        "images": torch.stack(ready) if ready else torch.empty(0, *shape, dtype=torch.uint8),
        "labels": torch.tensor([label for _, label in samples]),
        "operations": in_passes([pixels.operations for pixels in each], *shape[1:]),
        "places": [(number, patch.top, patch.left, *patch.values.shape[1:]) for number, patch in patches],
        "patches": torch.cat([torch.empty(0), *(patch.values.flatten() for _, patch in patches)]),
        **({"files": gather_files([each[place].values for place in later], later)} if later else {}),
    }


class Normalise:
    """What `collate` made, on any device -> images (B, C, H, W), float32, decoded where they are not, the operations
    done, DATA.MEAN taken off, over DATA.STD, the patches put in; labels (B,).

    `waits`: for the device, see `Loader.ahead`.
    Divisions are by tensors: for a number a GPU would multiply by its reciprocal, which gives another last bit.
    """

    def __init__(self, config: CfgNode, decode: Decoder | None = None):
        mean, std = (torch.tensor(_by_channel(config, key)) for key in ("MEAN", "STD"))
        self.constants = torch.tensor(255.0), mean[:, None, None], std[:, None, None]
        self.augment = Augment([min(255, round(255 * value)) for value in mean.tolist()])  # corners as timm fills them
        self.decode, self.waits = decode, decode is not None

    def __call__(self, batch: Mapping[str, Any]) -> Batch:
        images = self.decode(batch) if self.decode else batch["images"]
        images = self.augment(images, batch["operations"])
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        if self.constants[0].device != images.device:
            self.constants = tuple(constant.to(images.device, non_blocking=True) for constant in self.constants)
        white, mean, std = self.constants
        images.div_(white).sub_(mean).div_(std)
        start, channels = 0, images.shape[1]
        for number, top, left, height, width in batch["places"]:
            end = start + channels * height * width
            patch = batch["patches"][start:end].view(channels, height, width)
            images[number, :, top : top + height, left : left + width] = patch
            start = end
        return images, batch["labels"]


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


def let_posterize_take_zero_bits(transform: transforms.Compose) -> None:
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


def build_mixup(config: CfgNode) -> Callable[..., Batch] | None:
    """None when mixup and cutmix are off, else mix(images, labels, step=, part=) -> images, soft labels (B, classes).

    Drawn anew for every micro-batch of every process, as the released runs did: a function of (SEED, step, part),
    `part` being the micro-batch's place in the step's global batch.  Mixes `images` in place.
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

    def mix(images: Tensor, labels: Tensor, *, step: int, part: int) -> Batch:
        with preserved_generators():
            seed_generators(config.SEED, MIXUP, step, part)
            return mixup(images, labels)

    return mix
