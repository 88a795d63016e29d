"""What becomes of an image and its map before the model sees them: the ADE20K recipe of mmsegmentation."""

import random

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from yacs.config import CfgNode

from vmamba.config import sides
from vmamba.data.transforms import Normalise, as_image, fitted, resize
from vmamba.segmentation.datasets import Sample

_CROPS = 10  # drawn at most, until one is not all of one class


class TrainTransform:
    """Sample -> image (3, h, w) float32 and classes (h, w) int64 of CROP_SIZE: scaled, cropped, mirrored, distorted,
    padded with zeros that do not count."""

    def __init__(self, config: CfgNode):
        self.aug, self.scale, self.size = config.AUG, config.DATA.SCALE, sides(config.DATA.CROP_SIZE)
        self.ignored, self.normalise = config.DATA.IGNORE_INDEX, Normalise(config)
        self.distort = photometric_distortion if config.AUG.PHOTOMETRIC else v2.Identity()

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        image, classes = as_image(sample.image), tv_tensors.Mask(torch.from_numpy(sample.classes)[None])
        ratio = random.uniform(*self.aug.RESIZE_RATIO)
        size = fitted(image.shape[1:], *(ratio * side for side in self.scale))
        image, classes = resize(image, size), resize(classes, size)
        image, classes = self._cropped(image, classes)
        if random.random() < self.aug.HFLIP:
            image, classes = F.horizontal_flip(image), F.horizontal_flip(classes)
        image = self.normalise(self.distort(image))
        below, right = (wanted - side for wanted, side in zip(self.size, image.shape[1:], strict=True))
        image = F.pad(image, [0, 0, right, below])
        return image, F.pad(classes, [0, 0, right, below], fill=self.ignored)[0].as_subclass(Tensor).long()

    def _cropped(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        height, width = (min(wanted, side) for wanted, side in zip(self.size, image.shape[1:], strict=True))
        for _ in range(_CROPS):
            top, left = (
                random.randint(0, side - wanted) for wanted, side in zip((height, width), image.shape[1:], strict=True)
            )
            if self.aug.MOST_OF_ONE_CLASS == 1:
                break
            part = classes[..., top : top + height, left : left + width]
            counts = torch.bincount(part[part != self.ignored].flatten())
            if (counts > 0).sum() > 1 and counts.max() < self.aug.MOST_OF_ONE_CLASS * counts.sum():
                break
        return F.crop(image, top, left, height, width), F.crop(classes, top, left, height, width)


def photometric_distortion(image: Tensor) -> Tensor:
    """An image (3, H, W) uint8 with its brightness, contrast, saturation and hue changed, each by a coin, the contrast
    before or after the last two: mmsegmentation's PhotoMetricDistortion with its defaults, after SSD (arXiv
    1512.02325)."""
    image, contrast_first = image.as_subclass(Tensor), random.random() < 0.5
    if random.random() < 0.5:
        image = _bytes(image + random.uniform(-32, 32))
    if contrast_first:
        image = _contrast(image)
    if random.random() < 0.5:
        image = _saturated(image, random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        image = F.adjust_hue(image, random.randint(-18, 17) / 180)
    return image if contrast_first else _contrast(image)


def _contrast(image: Tensor) -> Tensor:
    return _bytes(image * random.uniform(0.5, 1.5)) if random.random() < 0.5 else image


def _saturated(image: Tensor, factor: float) -> Tensor:
    """The saturation of HSV times `factor`, hue and value kept: a channel's distance from the largest one grows so."""
    values = image.float()
    largest = values.amax(0)
    room = (largest - values.amin(0)).clamp(min=1)  # a saturation above 1 is 1
    return _bytes(largest - (largest - values) * torch.minimum(torch.tensor(factor), largest / room) + 0.5)


def _bytes(image: Tensor) -> Tensor:
    return image.clamp(0, 255).to(torch.uint8)


class EvalTransform:
    """Sample -> for each of TEST.SCALES the image (3, h, w) float32 fitted into SCALE times it; classes (H, W) uint8 of
    the file's own size; its name."""

    def __init__(self, config: CfgNode):
        self.scale, self.ratios, self.normalise = config.DATA.SCALE, config.TEST.SCALES, Normalise(config)

    def __call__(self, sample: Sample) -> tuple[list[Tensor], Tensor, str]:
        image = as_image(sample.image)
        sizes = [fitted(image.shape[1:], *(ratio * side for side in self.scale)) for ratio in self.ratios]
        images = [self.normalise(resize(image, size)) for size in sizes]
        return images, torch.from_numpy(sample.classes), sample.name
