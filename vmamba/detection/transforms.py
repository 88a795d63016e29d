"""What becomes of an image and its objects before the model sees them: the COCO recipes of mmdetection."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as V
from yacs.config import CfgNode

from vmamba.data.transforms import Normalise, as_image, fitted, resize
from vmamba.detection.datasets import Sample


@dataclass(frozen=True)
class Example:
    image: Tensor  # (3, h, w) float32
    target: dict[str, Tensor]  # boxes (N, 4), labels (N,), masks (N, h, w) uint8; held out, none of them
    image_id: int
    size: tuple[int, int]  # (h, w) of the file


class Transform:
    """Sample -> Example: fitted into DATA.SCALE; for training at a drawn scale, cropped before, mirrored."""

    def __init__(self, config: CfgNode, training: bool):
        self.aug, self.training, self.normalise = config.AUG, training, Normalise(config)
        self.short, self.long = config.DATA.SCALE
        self.short_sides = config.AUG.SHORT_SIDES or [self.short]

    def __call__(self, sample: Sample) -> Example:
        image = as_image(sample.image)
        size = tuple(image.shape[1:])
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(sample.boxes), format="XYXY", canvas_size=size)
        masks, labels = tv_tensors.Mask(torch.from_numpy(sample.masks)), torch.from_numpy(sample.labels)
        parts = image, V.clamp_bounding_boxes(boxes), masks
        if not self.training:
            parts = self._scaled(parts, self.short)
        else:
            if random.random() < self.aug.CROP:
                parts = self._scaled(parts, random.choice(self.aug.CROP_SHORT_SIDES))
                parts, labels = self._cropped(parts, labels)
            parts = self._scaled(parts, random.choice(self.short_sides))
            if random.random() < self.aug.HFLIP:
                parts = tuple(V.horizontal_flip(part) for part in parts)
            parts, labels = _with_area(parts, labels)
        image, boxes, masks = parts
        target = {"boxes": boxes.as_subclass(Tensor), "labels": labels, "masks": masks.as_subclass(Tensor)}
        return Example(self.normalise(image), target, sample.image_id, size)

    def _scaled(self, parts: Sequence[Tensor], short: float) -> tuple[Tensor, ...]:
        size = fitted(parts[0].shape[1:], short, self.long)
        return tuple(resize(part, size) for part in parts)

    def _cropped(self, parts: Sequence[Tensor], labels: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        least, most = self.aug.CROP_SIDES
        sides = [random.randint(min(side, least), min(side, most)) for side in parts[0].shape[1:]]
        top, left = (random.randint(0, side - wanted) for side, wanted in zip(parts[0].shape[1:], sides, strict=True))
        image, boxes, masks = (V.crop(part, top, left, *sides) for part in parts)
        return _with_area((image, V.clamp_bounding_boxes(boxes), masks), labels)


def _with_area(parts: Sequence[Tensor], labels: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Without the boxes that a crop cut off, or that are narrower than float32 tells."""
    image, boxes, masks = parts
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    boxes = tv_tensors.wrap(boxes[kept], like=boxes)
    return (image, boxes, tv_tensors.wrap(masks[kept], like=masks)), labels[kept]


class Collate:
    """Examples -> what `MaskRCNN` is called with, by its names, the images padded to a multiple of `divisor`; and the
    images' numbers and their files' sizes."""

    def __init__(self, divisor: int):
        self.divisor = divisor

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        sizes = [tuple(each.image.shape[1:]) for each in examples]
        padded = [tuple(-(-side // self.divisor) * self.divisor for side in size) for size in sizes]
        height, width = (max(sides) for sides in zip(*padded, strict=True))
        return {
            "images": torch.stack([_pad(each.image, height, width) for each in examples]),
            "image_sizes": sizes,
            "padded_sizes": padded,
            "targets": [each.target | {"masks": _pad(each.target["masks"], height, width)} for each in examples],
            "image_ids": [each.image_id for each in examples],
            "original_sizes": [each.size for each in examples],
        }


def _pad(x: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) -> (..., height, width)."""
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
