"""The region proposal network: which parts of an image may hold an object (arXiv 1506.01497)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from vmamba.detection.boxes import RPN_STDS, anchors, assign, cut, decode, encode, sample

STRIDES = (4, 8, 16, 32, 64)
_RATIOS = 3


@dataclass(frozen=True)
class ProposalSettings:
    """How many proposals a level may bring (`nms_pre`), their suppression's IoU, and how many an image keeps."""

    nms_pre: int = 1000
    max_per_img: int = 1000
    rpn_nms: float = 0.7


class RPNHead(nn.Module):
    """Scores and offsets of the anchors of five maps."""

    def __init__(self, channels: int, samples: int = 256):
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, _RATIOS, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * _RATIOS, 1)
        self.samples = samples
        for layer in self.children():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(B, C, H, W) a level -> scores (B, 3, H, W) and offsets (B, 12, H, W) a level."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]

    @torch.no_grad()
    def proposals(
        self,
        scores: Sequence[Tensor],
        offsets: Sequence[Tensor],
        image_sizes: Sequence[Sequence[int]],
        settings: ProposalSettings,
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image boxes (N, 4) and their scores (N,), the best first."""
        levels = []
        flat = zip(_grids(scores), _flat(scores, 1), _flat(offsets, 4), strict=True)
        for grid, score, offset in flat:
            chances, best = _best(score[..., 0].float().sigmoid(), settings.nms_pre)  # (B, n)
            offset = offset.gather(1, best[..., None].expand(-1, -1, 4)).float()
            levels.append((decode(grid[best], offset, RPN_STDS), chances))
        return [
            _suppress([(cut(boxes[image], size), chances[image]) for boxes, chances in levels], settings)
            for image, size in enumerate(image_sizes)
        ]

    def losses(
        self,
        scores: Sequence[Tensor],
        offsets: Sequence[Tensor],
        padded_sizes: Sequence[Sequence[int]],
        truths: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`truths`: of each image the boxes (N, 4).  Anchors outside of its padded size do not count."""
        grid = torch.cat(_grids(scores))
        flat_scores = torch.cat(_flat(scores, 1), 1)[..., 0].float()  # (B, anchors)
        flat_offsets = torch.cat(_flat(offsets, 4), 1).float()
        sizes = [map_.shape[2:] for map_ in scores]
        assigned = [
            assign(grid, boxes, above=0.7, below=0.3, least=0.3, counts=_inside(sizes, padded, grid.device))
            for boxes, padded in zip(truths, padded_sizes, strict=True)
        ]
        classification, regression, samples = 0, 0, 0
        for image, (positive, negative) in enumerate(sample(assigned, self.samples, 0.5)):
            score = flat_scores[image, torch.cat([positive, negative])]
            wanted = torch.zeros_like(score)
            wanted[: len(positive)] = 1
            classification = classification + F.binary_cross_entropy_with_logits(score, wanted, reduction="sum")
            target = encode(grid[positive], truths[image][assigned[image][positive]], RPN_STDS)
            regression = regression + (flat_offsets[image, positive] - target).abs().sum()
            samples += len(score)
        return {"loss_rpn_cls": classification / max(samples, 1), "loss_rpn_bbox": regression / max(samples, 1)}


def _flat(maps: Sequence[Tensor], numbers: int) -> list[Tensor]:
    """(B, A * numbers, H, W) a level -> (B, H * W * A, numbers)."""
    return [x.permute(0, 2, 3, 1).reshape(len(x), -1, numbers) for x in maps]


def _grids(maps: Sequence[Tensor]) -> list[Tensor]:
    """The anchors of each level."""
    return [anchors(x.shape[2:], stride, x.device) for x, stride in zip(maps, STRIDES, strict=True)]


def _best(chances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row (B, N) and their indices, the highest first, of equal ones the first."""
    chosen = chances.topk(min(count, chances.shape[1]), sorted=False).indices.sort().values
    values, order = chances.gather(1, chosen).sort(descending=True, stable=True)
    return values, chosen.gather(1, order)


def _inside(sizes: Sequence[Sequence[int]], padded_size: Sequence[int], device: torch.device) -> Tensor:
    """Which anchors' cells lie in the image with its own padding, not in the rest of the batch's."""
    height, width = padded_size
    flags = []
    for size, stride in zip(sizes, STRIDES, strict=True):
        rows = torch.arange(size[0], device=device) < -(-height // stride)
        columns = torch.arange(size[1], device=device) < -(-width // stride)
        flags.append((rows[:, None] & columns).reshape(-1, 1).expand(-1, _RATIOS).reshape(-1))
    return torch.cat(flags)


def _suppress(levels: Sequence[tuple[Tensor, Tensor]], settings: ProposalSettings) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) and scores (n,) of an image's levels -> those that stay, the best first.

    Level by level, not by `batched_nms`, whose time on a GPU grows with the square of all boxes (docs/log.md).  Boxes
    without area overlap none, so they may go at the end.
    """
    kept = [nms(box, score, settings.rpn_nms) for box, score in levels]
    boxes = torch.cat([box[index] for (box, _), index in zip(levels, kept, strict=True)])
    scores, order = torch.cat([score[index] for (_, score), index in zip(levels, kept, strict=True)]).sort(
        descending=True, stable=True
    )
    boxes = boxes[order]
    there = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[: settings.max_per_img, 0]
    return boxes[there], scores[there]
