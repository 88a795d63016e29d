"""Augmentation of batches on the device that computes.

A loading process draws what timm would do to an image, with timm's own code and the same draws, and writes it down:
its operations get a list in place of an image.  `in_passes` lays out what is to be done to a batch, and makes all that
needs no pixels.  `Augment` does it to pixels of 8 bits, as Pillow does it to one image; the tests say how near the
results are.

A GPU is slower to be asked for many small things than to do them: so few passes, each for as many images as it can be.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
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


def write_down(steps: Sequence[Callable], way: str) -> Callable[[], list[Operation]]:
    """`steps` of timm's transform behind the crop, changed so that a call draws what they do and does nothing.

    Raises UserError for a step that is not known here, and `way`, a DATA.DECODE, needs to be.
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
            raise UserError(f"DATA.DECODE {way} does not do {type(step).__name__}; choose DATA.DECODE pillow")
        for operation in [
            *getattr(step, "ops", []),
            *(each for policy in getattr(step, "policy", []) for each in policy),
        ]:
            _write_down(operation, way)

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


def _write_down(operation: AugmentOp, way: str) -> None:
    name = operation.name.removesuffix("Increasing").removesuffix("Original")
    if name not in (*_TABLES, *_MEASURED, *_BLENDS, *_MOVES):
        raise UserError(f"DATA.DECODE {way} does not do {operation.name}; choose DATA.DECODE pillow")

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


def in_passes(of_images: Sequence[Sequence[Operation]], height: int, width: int) -> dict[str, Any]:
    """What is done to a batch of images of this size: again and again all kinds of passes in turn, each for the images
    whose next operation is of its kind, until nothing is left.

    Returns `passes`, of each its kind and how many images get which of its operations; and what they need, one pass
    behind the other: `places` of images in the batch, int64; `matrices` (N, 2, 3) and `factors` (N,), float32; `tables`
    (N, 256), uint8.
    """
    left = [[*operations] for operations in of_images]
    passes, places, matrices, factors, tables = [], [], [], [], []
    while any(left):
        for kind, names in _KINDS.items():
            due: dict[str | int, list[tuple[int, Operation]]] = {name: [] for name in names}
            for image, operations in enumerate(left):
                if operations and _name(operations[0]) in due:
                    operation = operations.pop(0)
                    due[_name(operation)].append((image, operation))
            todo = [*chain(*due.values())]
            if todo:
                passes.append((kind, [len(those) for those in due.values()]))
            for image, operation in todo:
                places.append(image)
                if operation.name in _MOVES:
                    matrices.append(_MOVES[operation.name](operation.value, height, width))
                elif operation.name in _TABLES:
                    tables.append(_TABLES[operation.name](np.float32(operation.value)))
                elif operation.name in _WITH_FACTOR:
                    factors.append(operation.value)
    return {
        "passes": passes,
        "places": torch.tensor(places, dtype=torch.int64),
        "matrices": torch.tensor(matrices, dtype=torch.float32).view(-1, 2, 3),
        "factors": torch.tensor(factors, dtype=torch.float32),
        "tables": torch.from_numpy(np.array(tables, dtype=np.uint8).reshape(-1, 256)),
    }


def _name(operation: Operation) -> str | int:
    """Among those of its kind."""
    if operation.name in _MOVES:
        return operation.filter
    return _KNOWN if operation.name in _TABLES else operation.name


class Augment:
    """Does what `in_passes` lists.  `fill`: of each channel, 0 to 255, for pixels that come from outside an image."""

    def __init__(self, fill: Sequence[int]):
        self.fill = torch.tensor(fill, dtype=torch.float32)[:, None, None]

    def __call__(self, images: Tensor, todo: Mapping[str, Any]) -> Tensor:
        """(B, C, H, W) uint8 -> the same shape and type; `images` is written to."""
        if todo["passes"] and self.fill.device != images.device:
            self.fill = self.fill.to(images.device, non_blocking=True)
        places, matrices, factors, tables = (_Row(todo[name]) for name in ("places", "matrices", "factors", "tables"))
        for kind, counts in todo["passes"]:
            where = places.take(sum(counts))
            some = images.index_select(0, where)
            if kind in _FLIPS:
                done = some.flip(_FLIPS[kind])
            elif kind == "table":
                done = _looked_up(some, counts, tables.take(counts[0]), factors.take(counts[-1]))
            elif kind == "blend":
                done = _blended(some, counts, factors.take(len(some)))
            else:
                done = _moved(some, matrices.take(len(some)), kind, self.fill)
            images.index_copy_(0, where, done)
        return images


class _Row:
    """Of a tensor what lies one behind the other."""

    def __init__(self, values: Tensor):
        self.values, self.taken = values, 0

    def take(self, number: int) -> Tensor:
        start, self.taken = self.taken, self.taken + number
        return self.values[start : self.taken]


_FLIPS = {"HorizontalFlip": 3, "VerticalFlip": 2}

# Operations on each value by itself whatever the image: what becomes of 0 to 255.

_LEVELS = np.arange(256)


def _posterize(bits: np.float32) -> np.ndarray:
    """Of 8 bits the upper ones are kept."""
    grain = int(2 ** (8 - bits.clip(0, 8)))
    return _LEVELS // grain * grain


_TABLES: dict[str, Callable[[np.float32], np.ndarray]] = {
    "Brightness": lambda factor: (factor * _LEVELS.astype(np.float32)).clip(0, 255),
    "Invert": lambda _: 255 - _LEVELS,
    "Posterize": _posterize,
    "Solarize": lambda threshold: np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS),
    "SolarizeAdd": lambda more: np.where(_LEVELS < 128, (_LEVELS + int(more)).clip(0, 255), _LEVELS),
}

# Those for which an image is measured: images (B, C, H, W) and factors (B,) -> tables (B, C or 1, 256).


def _looked_up(images: Tensor, counts: Sequence[int], tables: Tensor, factors: Tensor) -> Tensor:
    """`tables` (N, 256) are of the first images, `factors` of the last."""
    known, *measured = images.split(counts)
    found = [
        tables[:, None],
        *(_MEASURED[name](some, factors) for name, some in zip(_MEASURED, measured, strict=True) if len(some)),
    ]
    table = torch.cat([each.to(torch.uint8).expand(-1, images.shape[1], -1) for each in found])
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device)


def _blend(one: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Pillow's: from `one` at factor 0 to `other` at 1 and beyond, cut off and rounded down."""
    return (one + factor * (other - one)).clamp(0, 255).floor()


def _gray(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W) int32, as Pillow's mode L."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _histogram(images: Tensor) -> Tensor:
    """(B, C, 256) int64."""
    values = images.flatten(2).long()
    return values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))


def _contrast(images: Tensor, factors: Tensor) -> Tensor:
    gray, pixels = _gray(images).flatten(1).sum(1, keepdim=True), images[0, 0].numel()
    mean = (2 * gray + pixels) // (2 * pixels)  # rounded half up
    return _blend(mean.float(), _levels(images).float(), factors[:, None])[:, None]


def _auto_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """The darkest value of a channel becomes 0, the lightest 255."""
    low, high = (bound[:, :, None].long() for bound in images.flatten(2).aminmax(dim=2))
    span, levels = (high - low).clamp(min=1).double(), _levels(images)
    scale = torch.full_like(span, 255) / span  # 255 / span would multiply by the reciprocal
    stretched = (levels * scale - low * scale).clamp(0, 255).floor()
    return torch.where(high > low, stretched.long(), levels)


def _equalize(images: Tensor, factors: Tensor) -> Tensor:
    """Each value of a channel comes as often as others, as far as that goes."""
    counts, levels = _histogram(images), _levels(images)
    last = images.flatten(2).amax(2, keepdim=True).long()
    step = (images[0, 0].numel() - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    table = (step // 2 + before) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp(max=255), levels)


_MEASURED = {"AutoContrast": _auto_contrast, "Equalize": _equalize, "Contrast": _contrast}

# Operations that go from another image to this one, and beyond: images (B, C, H, W) -> the other ones.


def _blended(images: Tensor, counts: Sequence[int], factors: Tensor) -> Tensor:
    parts = zip(_BLENDS.values(), images.split(counts), strict=True)
    others = torch.cat([other(some).float().expand_as(some) for other, some in parts if len(some)])
    return _blend(others, images.float(), factors[:, None, None, None]).to(torch.uint8)


def _smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH, which leaves the border as it is."""
    out = images.float()
    if min(images.shape[2:]) > 2:
        around = torch.nn.functional.avg_pool2d(out, 3, stride=1, divisor_override=1)
        inner = out[:, :, 1:-1, 1:-1]
        inner.copy_(((around + 4 * inner) / 13 + 0.5).floor())  # never a half: 13 is odd
    return out


_BLENDS = {"Color": _gray, "Sharpness": _smooth}

# Operations that move pixels: value, height, width -> the matrix (2 x 3, row by row) from a place in the result to that
# in the image, in pixels from the upper left corner.


def _rotate(degrees: float, height: int, width: int) -> tuple[float, ...]:
    angle = -math.radians(degrees)
    cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


_MOVES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "Rotate": _rotate,
    "ShearX": lambda factor, height, width: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, height, width: (1, 0, 0, factor, 1, 0),
    "TranslateX": lambda pixels, height, width: (1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda pixels, height, width: (1, 0, 0, 0, 1, pixels),
    "TranslateXRel": lambda share, height, width: (1, 0, share * width, 0, 1, 0),
    "TranslateYRel": lambda share, height, width: (1, 0, 0, 0, 1, share * height),
}


def _moved(images: Tensor, matrices: Tensor, resample: int, fill: Tensor) -> Tensor:
    """The images (B, C, H, W) seen through matrices (B, 2, 3), as Pillow transforms: what comes from outside is `fill`,
    and at the border a filter reads the last pixels again."""
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device)[:, None] + 0.5
    columns = torch.arange(width, device=images.device) + 0.5
    size = width + (height - width) * torch.arange(2, device=images.device)[:, None, None]
    of_column, of_row, shift = matrices[..., None, None].unbind(2)
    at = of_column * columns + of_row * rows + shift  # (B, 2, H, W): x and y
    inside = ((at >= 0) & (at < size)).all(1, keepdim=True)
    pixels, weights = _taps(at, size, resample)
    places, of_places = pixels[:, 0], weights[:, 0, None]
    lines, of_lines = (pixels[:, 1] * width).unbind(1), weights[:, 1, :, None].unbind(1)
    out = 0.0
    for line, of_line in zip(lines, of_lines, strict=True):
        where = (line[:, None] + places).view(batch, 1, -1).expand(-1, channels, -1)
        values = images.flatten(2).gather(2, where).view(batch, channels, -1, height, width)
        out = out + of_line * (values * of_places).sum(2)
    out = (out + 1e-3).clamp(0, 255).floor()  # Pillow rounds down, and 41.9999 here is 42 there
    return torch.where(inside, out, fill).to(torch.uint8)


def _taps(at: Tensor, size: Tensor, resample: int) -> tuple[Tensor, Tensor]:
    """Places (B, 2, H, W) -> along each axis, of this `size`, the T pixels that a filter reads (B, 2, T, H, W), int64,
    and their weights."""
    if resample == Resampling.NEAREST:
        first, start, weights = at.floor(), 0, [torch.ones_like(at)]
    else:
        first = (at - 0.5).floor()
        t = at - 0.5 - first
        if resample == Resampling.BILINEAR:
            start, weights = 0, [1 - t, t]
        else:  # cubic with a = -1
            square = t * t
            last = square * t - square
            start, weights = -1, [square - t - last, 1 - square + last, t - last, last]
    steps = torch.arange(start, start + len(weights), device=at.device)[:, None, None]
    pixels = first.long()[:, :, None] + steps
    return pixels.clamp(min=0).minimum(size[:, None] - 1), torch.stack(weights, 2)


# The kinds of passes, in the order in which they are tried, and the operations of each.
_KNOWN, _WITH_FACTOR = "known table", ("Contrast", *_BLENDS)
_KINDS: dict[str | int, tuple[str | int, ...]] = {
    **{flip: (flip,) for flip in _FLIPS},
    **{int(kind): (int(kind),) for kind in (Resampling.NEAREST, Resampling.BILINEAR, Resampling.BICUBIC)},
    "table": (_KNOWN, *_MEASURED),
    "blend": tuple(_BLENDS),
}
