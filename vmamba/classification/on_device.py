"""Augmentation of batches on the device that computes.

A loading process draws what timm would do to an image, with timm's own code and the same draws, and writes it down:
its operations get a list in place of an image.  Here that is done to pixels of 8 bits of a whole batch, as Pillow does
it to one image; the tests say how near the results are.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Resampling
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torch import Tensor
from torchvision import transforms

from vmamba.errors import UserError


@dataclass(frozen=True)
class Operation:
    """Of one image, under timm's name for it without "Increasing" and the like."""

    name: str
    value: float = 0.0  # a factor, degrees, a share of the side, bits or a threshold
    filter: int = Resampling.BILINEAR  # of one that moves pixels


def write_down(steps: Sequence[Callable]) -> Callable[[], list[Operation]]:
    """`steps` of timm's transform behind the crop, changed so that a call draws what they do and does nothing.

    Raises UserError for a step that is not known here.
    """
    known = (
        transforms.RandomHorizontalFlip,
        transforms.RandomVerticalFlip,
        transforms.ColorJitter,
        RandAugment,
        AutoAugment,
    )
    for step in steps:
        if not isinstance(step, known):
            raise UserError(f"DATA.DECODE torchvision does not do {type(step).__name__}; choose DATA.DECODE pillow")
        for operation in [
            *getattr(step, "ops", []),
            *(each for policy in getattr(step, "policy", []) for each in policy),
        ]:
            _write_down(operation)

    def draw() -> list[Operation]:
        operations: list[Operation] = []
        for step in steps:
            if isinstance(step, (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)):
                if torch.rand(1) < step.p:
                    operations.append(Operation(type(step).__name__.removeprefix("Random")))
            elif isinstance(step, transforms.ColorJitter):
                operations += _jitter(step)
            else:
                step(operations)
        return operations

    return draw


def _write_down(operation: AugmentOp) -> None:
    name = operation.name.removesuffix("Increasing").removesuffix("Original")
    if name not in _TABLES and name not in _BLENDS and name not in _MOVES:
        raise UserError(f"DATA.DECODE torchvision does not do {operation.name}; choose DATA.DECODE pillow")

    def record(operations: list[Operation], value: float = 0.0, **options: Any) -> list[Operation]:
        resample = options.get("resample", Resampling.BILINEAR)
        if name in _MOVES and isinstance(resample, (list, tuple)):
            resample = random.choice(resample)  # which timm draws then
        operations.append(Operation(name, float(value), int(resample) if name in _MOVES else Resampling.BILINEAR))
        return operations

    operation.aug_fn = record


def _jitter(step: transforms.ColorJitter) -> list[Operation]:
    order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    names = "Brightness", "Contrast", "Color"
    return [Operation(names[each], factors[each]) for each in order.tolist() if factors[each] is not None]


Group = tuple[Tensor, Tensor]  # images by their place in the batch, int64, and the values of their operations


def in_groups(of_images: Sequence[Sequence[Operation]]) -> list[dict[tuple[str, int], Group]]:
    """What is done to a batch: first the first operation of each image, then the second, ..., alike ones together."""
    rounds = []
    for turn in range(max(map(len, of_images), default=0)):
        members: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for image, operations in enumerate(of_images):
            if turn < len(operations):
                each = operations[turn]
                members.setdefault((each.name, each.filter), []).append((image, each.value))
        rounds.append(
            {
                kind: (torch.tensor([image for image, _ in those]), torch.tensor([value for _, value in those]))
                for kind, those in members.items()
            }
        )
    return rounds


class Augment:
    """Does what `in_groups` lists.  `fill`: of each channel, 0 to 255, for pixels that come from outside an image."""

    def __init__(self, fill: Sequence[int]):
        self.fill = torch.tensor(fill, dtype=torch.float32)[:, None, None]

    def __call__(self, images: Tensor, rounds: Sequence[Mapping[tuple[str, int], Group]]) -> Tensor:
        """(B, C, H, W) uint8 -> the same shape and type; `images` is written to."""
        if rounds and self.fill.device != images.device:
            self.fill = self.fill.to(images.device, non_blocking=True)
        for groups in rounds:
            for (name, resample), (places, values) in groups.items():
                some = images.index_select(0, places)
                images.index_copy_(0, places, self._done(name, resample, some, values))
        return images

    def _done(self, name: str, resample: int, images: Tensor, values: Tensor) -> Tensor:
        if name in _FLIPS:
            return images.flip(_FLIPS[name])
        if name in _TABLES:
            table = _TABLES[name](images, values).expand(*images.shape[:2], 256)
            return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)
        if name in _BLENDS:
            return _blend(_BLENDS[name](images), images.float(), values[:, None, None, None]).to(torch.uint8)
        return _moved(images, _MOVES[name](values, *images.shape[2:]), resample, self.fill)


_FLIPS = {"HorizontalFlip": 3, "VerticalFlip": 2}

# Operations on each value by itself: images (B, C, H, W) and values (B,) -> what becomes of 0 to 255, (B, C or 1, 256).


def _levels(values: Tensor) -> Tensor:
    return torch.arange(256, device=values.device)


def _blend(one: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Pillow's: from `one` at factor 0 to `other` at 1 and beyond, cut off and rounded down."""
    return (one + factor * (other - one)).clamp(0, 255).floor()


def _gray(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W) int64, as Pillow's mode L."""
    if images.shape[1] == 1:
        return images.long()
    red, green, blue = images.long().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _histogram(images: Tensor) -> Tensor:
    """(B, C, 256) int64."""
    values = images.flatten(2).long()
    return values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))


def _brightness(images: Tensor, values: Tensor) -> Tensor:
    levels = _levels(values).float()
    return _blend(torch.zeros_like(levels), levels, values[:, None])[:, None]


def _contrast(images: Tensor, values: Tensor) -> Tensor:
    mean = (_gray(images).flatten(1).double().mean(1) + 0.5).floor().float()[:, None]
    return _blend(mean, _levels(values).float(), values[:, None])[:, None]


def _auto_contrast(images: Tensor, values: Tensor) -> Tensor:
    """The darkest value of a channel becomes 0, the lightest 255."""
    there, levels = _histogram(images) > 0, _levels(values)
    low, high = torch.where(there, levels, 255).amin(2, True), torch.where(there, levels, 0).amax(2, True)
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255) / span  # 255 / span would multiply by the reciprocal
    stretched = (levels * scale - low * scale).clamp(0, 255).floor()
    return torch.where(high > low, stretched.long(), levels)


def _equalize(images: Tensor, values: Tensor) -> Tensor:
    """Each value of a channel comes as often as others, as far as that goes."""
    counts, levels = _histogram(images), _levels(values)
    last = torch.where(counts > 0, levels, 0).amax(2, True)
    step = (counts.sum(2, True) - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    table = (step // 2 + before) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp(max=255), levels)


def _invert(images: Tensor, values: Tensor) -> Tensor:
    return (255 - _levels(values))[None, None]


def _posterize(images: Tensor, values: Tensor) -> Tensor:
    """Of 8 bits the upper `values` are kept."""
    grain = (2.0 ** (8 - values.clamp(0, 8))).long()[:, None]
    return (_levels(values) // grain * grain)[:, None]


def _solarize(images: Tensor, values: Tensor) -> Tensor:
    levels = _levels(values)
    return torch.where(levels < values[:, None], levels, 255 - levels)[:, None]


def _solarize_add(images: Tensor, values: Tensor) -> Tensor:
    levels = _levels(values)
    return torch.where(levels < 128, (levels + values[:, None].long()).clamp(max=255), levels)[:, None]


_TABLES = {
    "Brightness": _brightness, "Contrast": _contrast, "AutoContrast": _auto_contrast, "Equalize": _equalize,
    "Invert": _invert, "Posterize": _posterize, "Solarize": _solarize, "SolarizeAdd": _solarize_add,
}  # fmt: skip

# Operations that go from another image to this one, and beyond.


def _smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH, which leaves the border as it is."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    out, channels = images.float(), images.shape[1]
    if min(images.shape[2:]) > 2:
        kernel = (kernel / 13).expand(channels, 1, 3, 3)
        inner = torch.nn.functional.conv2d(out, kernel, groups=channels)
        out[:, :, 1:-1, 1:-1] = (inner + 0.5).floor().clamp(0, 255)
    return out


_BLENDS = {"Color": lambda images: _gray(images).float(), "Sharpness": _smooth}

# Operations that move pixels: values (B,), height, width -> matrices (B, 2, 3) from a place in the result to that in
# the image, in pixels from the upper left corner.


def _matrices(*rows: Tensor | float) -> Tensor:
    like = next(each for each in rows if isinstance(each, Tensor))
    return torch.stack([torch.as_tensor(each).to(like).expand_as(like) for each in rows], 1).view(-1, 2, 3)


def _rotate(degrees: Tensor, height: int, width: int) -> Tensor:
    angle = -degrees * (math.pi / 180)
    cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
    return _matrices(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


_MOVES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "Rotate": _rotate,
    "ShearX": lambda factor, height, width: _matrices(1.0, factor, 0.0, 0.0, 1.0, 0.0),
    "ShearY": lambda factor, height, width: _matrices(1.0, 0.0, 0.0, factor, 1.0, 0.0),
    "TranslateX": lambda pixels, height, width: _matrices(1.0, 0.0, pixels, 0.0, 1.0, 0.0),
    "TranslateY": lambda pixels, height, width: _matrices(1.0, 0.0, 0.0, 0.0, 1.0, pixels),
    "TranslateXRel": lambda share, height, width: _matrices(1.0, 0.0, share * width, 0.0, 1.0, 0.0),
    "TranslateYRel": lambda share, height, width: _matrices(1.0, 0.0, 0.0, 0.0, 1.0, share * height),
}


def _moved(images: Tensor, matrices: Tensor, resample: int, fill: Tensor) -> Tensor:
    """The images (B, C, H, W) seen through matrices (B, 2, 3), as Pillow transforms: what comes from outside is `fill`,
    and at the border a filter reads the last pixels again."""
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device)[:, None] + 0.5
    columns = torch.arange(width, device=images.device) + 0.5
    a, b, c, d, e, f = matrices.flatten(1)[:, :, None, None].unbind(1)
    x, y = a * columns + b * rows + c, d * columns + e * rows + f  # (B, H, W)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat, out = images.flatten(2), 0.0
    for row, of_row in _taps(y, height, resample):
        for column, of_column in _taps(x, width, resample):
            place = (row * width + column).view(batch, 1, -1).expand(-1, channels, -1)
            out = out + (of_row * of_column)[:, None] * flat.gather(2, place).view_as(images)
    out = (out + 1e-3).clamp(0, 255).floor()  # Pillow rounds down, and 41.9999 here is 42 there
    return torch.where(inside[:, None], out, fill).to(torch.uint8)


def _taps(at: Tensor, size: int, resample: int) -> list[tuple[Tensor, Tensor]]:
    """The pixels of a line that a filter reads, and their weights."""
    if resample == Resampling.NEAREST:
        return [(at.floor().long().clamp(0, size - 1), torch.ones_like(at))]
    first = (at - 0.5).floor()
    t = at - 0.5 - first
    if resample == Resampling.BILINEAR:
        weights = {0: 1 - t, 1: t}
    else:  # cubic with a = -1
        weights = {
            -1: -t + 2 * t**2 - t**3,
            0: 1 - 2 * t**2 + t**3,
            1: t + t**2 - t**3,
            2: -(t**2) + t**3,
        }
    return [((first.long() + step).clamp(0, size - 1), weight) for step, weight in weights.items()]
