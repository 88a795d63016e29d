"""Boxes (x1, y1, x2, y2) in pixels: anchors, their offsets to other boxes, what is assigned to what, sampling.

The rules are mmdetection's, which trained the released files; torchvision's differ in several.  Nothing here waits for
the device but where it says so, and numbers are given as such, since each list made a tensor there would wait too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

RPN_STDS = (1.0, 1.0)  # of offsets of the centre, and of the logarithm of the sides
BOX_STDS = (0.1, 0.2)
_MOST_GROWTH = math.log(1000 / 16)  # of a side: beyond it an offset is cut
_PAIRS = 1 << 22  # of truth and box that are compared at a time: some 150 MB


def anchors(size: Sequence[int], stride: int, device: torch.device, ratios: Sequence[float] = (0.5, 1, 2)) -> Tensor:
    """Of a map of `size` (H, W): (H * W * ratios, 4), of 8 strides' side, not rounded, about the cells' corners."""
    rows = torch.arange(size[0], device=device, dtype=torch.float32) * stride
    columns = torch.arange(size[1], device=device, dtype=torch.float32) * stride
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    shapes = []
    for ratio in ratios:
        half_width, half_height = 4 * stride / math.sqrt(ratio), 4 * stride * math.sqrt(ratio)
        shapes.append(torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], -1))
    return torch.stack(shapes, 2).reshape(-1, 4)


def encode(boxes: Tensor, targets: Tensor, stds: Sequence[float]) -> Tensor:
    """(N, 4) and (N, 4) -> offsets (N, 4) that `decode` makes `targets` of."""
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    to_centres, to_sizes = (targets[:, :2] + targets[:, 2:]) / 2, targets[:, 2:] - targets[:, :2]
    return torch.cat([(to_centres - centres) / sizes / stds[0], (to_sizes / sizes).log() / stds[1]], 1)


def decode(boxes: Tensor, offsets: Tensor, stds: Sequence[float]) -> Tensor:
    """(..., 4) and offsets (..., 4) -> boxes (..., 4)."""
    centres, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    centres = centres + offsets[..., :2] * stds[0] * sizes
    half = sizes * (offsets[..., 2:] * stds[1]).clamp(-_MOST_GROWTH, _MOST_GROWTH).exp() / 2
    return torch.cat([centres - half, centres + half], -1)


def cut(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """What of boxes (..., 4) lies in an image of `size` (h, w)."""
    height, width = size
    return torch.stack([boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)], -1).flatten(-2)


def assign(
    boxes: Tensor, truths: Tensor, above: float, below: float, least: float, counts: Tensor | None = None
) -> Tensor:
    """Which truth each box stands for: its index, -1 for background, -2 for a box that does not count.

    A box stands for the truth that it overlaps most (the first of several) when their IoU is at least `above`, for
    background when it is less than `below`; and the boxes nearest to a truth stand for it from an IoU of `least` on
    (the last such truth's).  `counts` (boxes,): False where a box does not count; None: all do.
    """
    most, nearest = boxes.new_full((len(boxes),), -1), boxes.new_full((len(boxes),), -1, dtype=torch.long)
    low = nearest
    size = max(1, _PAIRS // max(1, len(boxes)))
    for first in range(0, len(truths) if len(boxes) else 0, size):
        overlaps = box_iou(truths[first : first + size], boxes)  # (some truths, boxes)
        if counts is not None:
            overlaps = overlaps.masked_fill(~counts, -1)
        highest, index = overlaps.max(0)
        nearest = torch.where(highest > most, index + first, nearest)
        most = torch.maximum(highest, most)
        best = overlaps.max(1, keepdim=True).values
        order = torch.arange(first, first + len(overlaps), device=boxes.device)[:, None]
        low = torch.maximum(low, torch.where((overlaps == best) & (best >= least), order, -1).max(0).values)
    assigned = torch.where(most >= above, nearest, torch.where(most < below, -1, -2))
    assigned = torch.where(low >= 0, low, assigned)
    return assigned if counts is None else assigned.masked_fill(~counts, -2)


def sample(assigned: Sequence[Tensor], count: int, fraction: float) -> list[tuple[Tensor, Tensor]]:
    """For each image indices of `count` boxes at most, drawn: at most `fraction` of them that stand for a truth, and
    background.  Waits for the device, once for all images."""
    drawn = []
    for each in assigned:
        chances = torch.rand(len(each), device=each.device)
        for mask, most in ((each >= 0, int(count * fraction)), (each == -1, count)):
            drawn.append(torch.where(mask, chances, -1).topk(min(most, len(each))))
    found = torch.stack([(chances >= 0).sum() for chances, _ in drawn]).tolist() if drawn else []
    pairs = zip(drawn[::2], drawn[1::2], found[::2], found[1::2], strict=True)
    return [
        (positive.indices[:positives], negative.indices[: min(negatives, count - positives)])
        for positive, negative, positives, negatives in pairs
    ]
