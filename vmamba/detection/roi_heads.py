"""The second stage of Mask R-CNN: what each proposal is, its box and its mask (arXiv 1703.06870)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, roi_align

from vmamba.detection.boxes import BOX_STDS, assign, cut, decode, encode, sample
from vmamba_kernels import autocast_dtype

STRIDES = (4, 8, 16, 32)
_FINEST = 56  # sides from which a box is read one level up
_PIXELS = 1 << 25  # of masks of an image's size that are computed at a time: 130 MB where read, 600 where pasted


@dataclass(frozen=True)
class PredictionSettings:
    """The least score of a prediction, its suppression's IoU, most predictions an image, threshold of its mask."""

    score_thr: float = 0.05
    nms: float = 0.5
    max_dets: int = 100
    mask_thr: float = 0.5


def read_regions(maps: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
    """Of each image's boxes (N, 4) the maps' part, (all N, C, side, side), from the level that suits a box.  Waits for
    the device once."""
    rois = torch.cat([F.pad(each, (1, 0), value=image) for image, each in enumerate(boxes)])
    areas = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    levels = (areas.sqrt() / _FINEST + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1)
    order = levels.argsort(stable=True)
    counts = torch.stack([(levels == level).sum() for level in range(len(STRIDES))]).tolist()
    parts = [
        _aligned(map_, part, side, stride)
        for map_, part, stride in zip(maps, rois[order].split(counts), STRIDES, strict=False)  # the last has no boxes
    ]
    return torch.cat(parts)[order.argsort()]


def _aligned(map_: Tensor, boxes: Tensor, side: int, stride: int) -> Tensor:
    """torchvision's, which has no kernel of bfloat16, and in 16 bits rounds boxes to whole pixels and more: where
    autocast does not see to that, such maps are read in float32."""
    dtype = map_.dtype
    if dtype in (torch.float16, torch.bfloat16) and autocast_dtype(map_.device.type) is None:
        map_ = map_.float()
    return roi_align(map_, boxes.to(map_.dtype), side, 1 / stride, sampling_ratio=0, aligned=True).to(dtype)


class BoxHead(nn.Module):
    """Two fully connected layers, the class and a box for each class."""

    side = 7

    def __init__(self, channels: int, hidden: int, num_classes: int):
        super().__init__()
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 * num_classes)
        self.shared_fcs = nn.ModuleList([nn.Linear(channels * self.side**2, hidden), nn.Linear(hidden, hidden)])
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in self.shared_fcs:
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.fc_cls, self.fc_reg, *self.shared_fcs):
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, 7, 7) -> scores (N, classes + 1), the background last, and offsets (N, classes, 4)."""
        hidden = regions.flatten(1)
        for layer in self.shared_fcs:
            hidden = F.relu(layer(hidden))
        return self.fc_cls(hidden), self.fc_reg(hidden).unflatten(1, (-1, 4))


class ConvReLU(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class MaskHead(nn.Module):
    """Four convolutions, twice the side, a mask for each class."""

    side = 14

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.ModuleList(ConvReLU(channels) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for layer in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """(N, C, 14, 14) -> logits (N, classes, 28, 28)."""
        for layer in self.convs:
            regions = layer(regions)
        return self.conv_logits(F.relu(self.upsample(regions)))


class RoIHead(nn.Module):
    """Both heads.  Where `samples` boxes an image are drawn for training, a quarter at most stands for truths."""

    def __init__(self, channels: int, hidden: int, num_classes: int, samples: int = 512):
        super().__init__()
        self.bbox_head = BoxHead(channels, hidden, num_classes)
        self.mask_head = MaskHead(channels, num_classes)
        self.num_classes, self.samples = num_classes, samples

    def losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`proposals`: of each image boxes (N, 4), to which its true ones are added."""
        assigned, candidates = [], []
        for proposed, target in zip(proposals, targets, strict=True):
            own = torch.arange(len(target["boxes"]), device=proposed.device)
            assigned.append(torch.cat([own, assign(proposed, target["boxes"], above=0.5, below=0.5, least=0.5)]))
            candidates.append(torch.cat([target["boxes"], proposed]))
        positives, boxes, truths, classes, masks = [], [], [], [], []
        for image, (positive, negative) in enumerate(sample(assigned, self.samples, 0.25)):
            chosen, stands_for, target = candidates[image][positive], assigned[image][positive], targets[image]
            positives.append(chosen)
            boxes.append(torch.cat([chosen, candidates[image][negative]]))
            truths.append(target["boxes"][stands_for])
            classes.append(target["labels"][stands_for])
            masks.append(_mask_targets(target["masks"], chosen, stands_for, 2 * MaskHead.side))
        losses = self._box_losses(maps, boxes, truths, classes)
        classes = torch.cat(classes)
        logits = self.mask_head(read_regions(maps, positives, MaskHead.side)).float()
        chosen = logits[torch.arange(len(classes), device=logits.device), classes]
        mask_loss = F.binary_cross_entropy_with_logits(chosen, torch.cat(masks), reduction="sum")
        return losses | {"loss_mask": mask_loss / max(chosen.numel(), 1)}

    def _box_losses(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor], truths: Sequence[Tensor], classes: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Of each image: boxes, of which the first stand for `truths` of `classes`, and the others for background."""
        scores, offsets = (x.float() for x in self.bbox_head(read_regions(maps, boxes, BoxHead.side)))
        sizes, count = [len(each) for each in boxes], max(len(scores), 1)
        images = zip(boxes, truths, classes, scores.split(sizes), offsets.split(sizes), strict=True)
        classification, regression, right = 0, 0, 0
        for box, truth, label, score, offset in images:
            positives = len(label)
            labels = F.pad(label, (0, len(box) - positives), value=self.num_classes)
            classification = classification + F.cross_entropy(score, labels, reduction="sum")
            target = encode(box[:positives], truth, BOX_STDS)
            chosen = offset[torch.arange(positives, device=label.device), label]
            regression = regression + (chosen - target).abs().sum()
            right = right + (score.detach().argmax(1) == labels).sum()
        return {"loss_cls": classification / count, "loss_bbox": regression / count, "acc": 100 * right / count}

    def predict(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        image_sizes: Sequence[Sequence[int]],
        settings: PredictionSettings,
    ) -> list[dict[str, Tensor]]:
        """Of each image `boxes` (N, 4), `scores` (N,), `labels` (N,), the best first, and `mask_logits` (N, 28, 28)."""
        scores, offsets = self.bbox_head(read_regions(maps, proposals, BoxHead.side))
        counts = [len(each) for each in proposals]
        predictions = []
        for boxes, size, score, offset in zip(
            proposals, image_sizes, scores.float().split(counts), offsets.float().split(counts), strict=True
        ):
            boxes = cut(decode(boxes[:, None], offset, BOX_STDS), size)  # (N, classes, 4)
            predictions.append(_choose(boxes, score.softmax(1)[:, :-1], settings))
        logits = self.mask_head(read_regions(maps, [each["boxes"] for each in predictions], MaskHead.side)).float()
        for each, its_logits in zip(predictions, logits.split([len(p["boxes"]) for p in predictions]), strict=True):
            each["mask_logits"] = its_logits[torch.arange(len(its_logits), device=logits.device), each["labels"]]
        return predictions


def _mask_targets(masks: Tensor, boxes: Tensor, stands_for: Tensor, side: int) -> Tensor:
    """Masks (truths, H, W) and boxes (N, 4) -> (N, side, side) of 0 and 1: what of its truth's mask lies in each."""
    height, width = masks.shape[1:]
    boxes, many = cut(boxes, (height, width)), max(1, _PIXELS // (height * width))
    share = boxes.new_zeros(len(boxes), 1, side, side)
    for first in range(0, len(masks), many):
        place = stands_for[:, None] - first
        # Boxes of other truths are empty here, and of an empty box RoIAlign reads nothing, which is 0.
        rois = torch.cat([place.to(boxes.dtype), boxes], 1).where((place >= 0) & (place < many), 0)
        part = masks[first : first + many, None]
        share += roi_align(part.to(boxes.dtype), rois, side, 1.0, sampling_ratio=0, aligned=True)
    return (share[:, 0] >= 0.5).to(boxes.dtype)


def _choose(boxes: Tensor, scores: Tensor, settings: PredictionSettings) -> dict[str, Tensor]:
    """Boxes (N, classes, 4) and scores (N, classes) -> the predictions."""
    rows, labels = (scores > settings.score_thr).nonzero(as_tuple=True)
    boxes, scores = boxes[rows, labels], scores[rows, labels]
    kept = batched_nms(boxes, scores, labels, settings.nms)[: settings.max_dets]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def paste_masks(logits: Tensor, boxes: Tensor, size: Sequence[int], threshold: float) -> Tensor:
    """Logits (N, 28, 28) of what lies in boxes (N, 4) -> masks (N, H, W), True where the object is."""
    pasted = torch.zeros(len(boxes), *size, dtype=torch.bool, device=boxes.device)
    first = 0
    for part in pasted_in_parts(logits, boxes, size, threshold):
        pasted[first : first + len(part)] = part
        first += len(part)
    return pasted


def pasted_in_parts(logits: Tensor, boxes: Tensor, size: Sequence[int], threshold: float) -> Iterator[Tensor]:
    """As `paste_masks`, some masks (n, H, W) at a time: a hundred of a photograph's size are gigabytes."""
    height, width = size
    many = max(1, _PIXELS // (height * width))
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    for first in range(0, len(boxes), many):
        part = slice(first, first + many)
        x1, y1, x2, y2 = boxes[part, :, None].unbind(1)  # (n, 1) each
        columns = (x - x1) / (x2 - x1) * 2 - 1  # (n, W)
        rows = (y - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(
            [columns[:, None].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], -1
        )  # (n, H, W, 2)
        yield F.grid_sample(logits[part, None].sigmoid(), grid, align_corners=False)[:, 0] >= threshold
