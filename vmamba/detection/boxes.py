"""Boxes (x1, y1, x2, y2) in pixels: anchors, their offsets to other boxes, what is assigned to what, sampling.

The rules are mmdetection's, which trained the released files; torchvision's differ in several.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from vmamba.errors import UserError

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
_MOST_GROWTH = math.log(1000 / 16)  # of a side: beyond it an offset is cut


def anchors(size: Sequence[int], stride: int, device: torch.device, ratios: Sequence[float] = (0.5, 1, 2)) -> Tensor:
    """Of a map of `size` (H, W): (H * W * ratios, 4), of 8 strides' side, not rounded, about the cells' corners."""
    roots = torch.tensor(ratios, device=device).sqrt()
    half = torch.stack([8 * stride / roots, 8 * stride * roots], 1) / 2  # (ratios, 2): width and height
    rows = torch.arange(size[0], device=device) * stride
    columns = torch.arange(size[1], device=device) * stride
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
    return torch.cat([centres - half, centres + half], -1).reshape(-1, 4)


def encode(boxes: Tensor, targets: Tensor, stds: Sequence[float]) -> Tensor:
    """(N, 4) and (N, 4) -> offsets (N, 4) that `decode` makes `targets` of."""
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    to_centres, to_sizes = (targets[:, :2] + targets[:, 2:]) / 2, targets[:, 2:] - targets[:, :2]
    offsets = torch.cat([(to_centres - centres) / sizes, (to_sizes / sizes).log()], 1)
    return offsets / offsets.new_tensor(stds)


def decode(boxes: Tensor, offsets: Tensor, stds: Sequence[float], size: Sequence[int]) -> Tensor:
    """(N, 4) and offsets (N, K, 4) -> boxes (N, K, 4), cut at the image's `size` (h, w)."""
    offsets = offsets * offsets.new_tensor(stds)
    centres, sizes = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2, boxes[:, None, 2:] - boxes[:, None, :2]
    centres = centres + offsets[..., :2] * sizes
    half = sizes * offsets[..., 2:].clamp(-_MOST_GROWTH, _MOST_GROWTH).exp() / 2
    corners = torch.cat([centres - half, centres + half], -1)
    height, width = size
    return torch.minimum(corners.clamp(min=0), corners.new_tensor([width, height, width, height]))


def assign(boxes: Tensor, truths: Tensor, above: float, below: float, least: float) -> Tensor:
    """Which truth each box stands for: its index, -1 for background, -2 for a box that does not count.

    A box stands for the truth that it overlaps most when their IoU is at least `above`, for background when it is less
    than `below`; and the boxes nearest to a truth stand for it from an IoU of `least` on (the last such truth's).
    """
    if not len(truths) or not len(boxes):
        return boxes.new_full((len(boxes),), -1, dtype=torch.long)
    overlaps = box_iou(truths, boxes)  # (truths, boxes)
    most, nearest = overlaps.max(0)
    assigned = torch.where(most >= above, nearest, torch.where(most < below, -1, -2))
    best = overlaps.max(1, keepdim=True).values
    low = (overlaps == best) & (best >= least)
    order = torch.arange(len(truths), device=boxes.device)[:, None]
    last = torch.where(low, order, -1).max(0).values
    return torch.where(last >= 0, last, assigned)


def sample(assigned: Tensor, count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of `count` boxes at most, drawn: at most `fraction` that stand for a truth, and background."""
    positive, negative = (assigned >= 0).nonzero()[:, 0], (assigned == -1).nonzero()[:, 0]
    positive = _draw(positive, int(count * fraction))
    return positive, _draw(negative, count - len(positive))


def _draw(indices: Tensor, count: int) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]


def check_targets(targets: Sequence[dict], num_classes: int) -> None:
    """Raises UserError for labels that the model has no class for."""
    for target in targets:
        labels = target["labels"]
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
            raise UserError(f"a label is {int(labels.max())}, and the model has {num_classes} classes, counted from 0")
