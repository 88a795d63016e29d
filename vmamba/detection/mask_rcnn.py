"""Mask R-CNN (arXiv 1703.06870) with a feature pyramid (arXiv 1612.03144) on any backbone, as mmdetection defines it.

The pyramid, RoIAlign and the suppression are torchvision's; the rules around them are not its own (its box losses,
anchors, matches, mask targets and aligning differ), so they are written here.
"""

import math
import operator
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vmamba.detection.roi_heads import PredictionSettings, RoIHead, paste_masks, pasted_in_parts
from vmamba.detection.rpn import ProposalSettings, RPNHead
from vmamba.errors import UserError
from vmamba.models.layers import take_strides_of_gradients
from vmamba.models.whole import check_images
from vmamba.values import Takes
from vmamba_kernels.private import is_exporting

TRAINING_PROPOSALS, PROPOSALS, PREDICTIONS = ProposalSettings(nms_pre=2000), ProposalSettings(), PredictionSettings()
Target = dict[str, Tensor]  # boxes (N, 4) in pixels, labels (N,) from 0, masks (N, H, W) of the padded image

_NECK = (
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"neck.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"neck.layer_blocks.\1.0."),
)


class MaskRCNN(nn.Module):
    """A detector.

    Args:
        backbone: (B, 3, H, W) -> four maps, the finest first, of `backbone.channels`.
        channels, hidden: of the pyramid and the heads, and of the box head's two layers.
        training_proposals, proposals, predictions: what is kept, see there.
        rpn_samples, samples: boxes an image that a step of training reads in each stage.
    """

    takes = MappingProxyType(
        dict.fromkeys(("num_classes", "channels", "hidden", "rpn_samples", "samples"), Takes((int,), at_least=1))
    )
    class_layers = ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 256,
        hidden: int = 1024,
        training_proposals: ProposalSettings = TRAINING_PROPOSALS,
        proposals: ProposalSettings = PROPOSALS,
        predictions: PredictionSettings = PREDICTIONS,
        rpn_samples: int = 256,
        samples: int = 512,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.training_proposals, self.proposals, self.predictions = training_proposals, proposals, predictions
        self.backbone = backbone
        self.neck = FeaturePyramidNetwork(backbone.channels, channels, LastLevelMaxPool())
        for layer in self.neck.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        self.rpn_head = RPNHead(channels, rpn_samples)
        self.roi_head = RoIHead(channels, hidden, num_classes, samples)
        take_strides_of_gradients(self.neck, self.rpn_head, self.roi_head)

    @staticmethod
    def name_of_head(released: str) -> str:
        """Our name of a weight of neck or heads, whose names are the released ones but for torchvision's pyramid."""
        for pattern, ours in _NECK:
            released = re.sub(pattern, ours, released)
        return released

    def everywhere(self, images: Tensor) -> tuple[Tensor, ...]:
        """What an image costs, whatever it shows: all of the network, the heads on 1000 empty regions and 100 masks, as
        mmdetection counts multiply-adds.  The outputs say nothing."""
        maps = self.pyramid(images)
        scores, offsets = self.rpn_head(maps)
        regions = [maps[0].new_zeros(count, maps[0].shape[1], side, side) for count, side in ((1000, 7), (100, 14))]
        boxes = self.roi_head.bbox_head(regions[0])
        return *scores, *offsets, *boxes, self.roi_head.mask_head(regions[1])

    def compile(self, *args: Any, **options: Any) -> None:
        """`nn.Module.compile` of the backbone: what follows it depends on how many boxes there are."""
        self.backbone.compile(*args, **options)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> five maps (B, channels, H / stride, W / stride), strides 4 to 64."""
        maps = self.backbone(images)
        return list(self.neck(OrderedDict((str(level), each) for level, each in enumerate(maps))).values())

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[Sequence[int]] | None = None,
        targets: Sequence[Target] | None = None,
        padded_sizes: Sequence[Sequence[int]] | None = None,
        output_sizes: Sequence[Sequence[int]] | None = None,
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Predictions of each image, or with `targets` the losses by name.

        Args:
            images: (B, 3, H, W), normalised, padded at the right and below.
            image_sizes: (h, w) of each without its padding; None: none is padded.
            targets: of each image `boxes` (N, 4) in pixels, `labels` (N,) int64 from 0 and `masks` (N, H, W) of 0 and
                1, padded as the images are.
            padded_sizes: (h, w) of each with the padding that it would have alone; anchors beyond it do not count in
                training, as in mmdetection.  None: that of the batch.
            output_sizes: (H, W) of each that predictions are in, such as its file's; None: `image_sizes`.

        Returns for each image `boxes` (n, 4), `scores` (n,), `labels` (n,), the best first, and `masks` (n, h, w); or
        `loss_rpn_cls`, `loss_rpn_bbox`, `loss_cls`, `loss_bbox` and `loss_mask`, to be added up, and `acc`, the box
        head's share of right classes in percent.  Raises UserError for images that are no batch, for targets of other
        shapes or classes, boxes without area or outside of their image, and for sizes that are not one (height, width)
        for each image, or larger than the batch where they lie in it.
        """
        if torch.jit.is_tracing() or (torch.compiler.is_compiling() and is_exporting()):
            raise UserError(
                "a detector gives as many boxes as it finds, which no recorded program does; record its maps, those of "
                "model.backbone"
            )
        check_images(images, self.rpn_head.rpn_cls.weight, "detector")
        image_sizes = _sizes("image_sizes", image_sizes, images)
        padded_sizes = _sizes("padded_sizes", padded_sizes, images)
        output_sizes = image_sizes if output_sizes is None else output_sizes
        output_sizes = _sizes("output_sizes", output_sizes, images, within=False)
        if targets is None:
            found = self.detect(images, image_sizes, output_sizes)
            for each, size in zip(found, output_sizes, strict=True):
                logits = each.pop("mask_logits")
                each["masks"] = paste_masks(logits, each["boxes"], size, self.predictions.mask_thr)
            return found
        _check_targets(targets, images, image_sizes, self.num_classes)
        maps = self.pyramid(images)
        scores, offsets = self.rpn_head(maps)
        losses = self.rpn_head.losses(scores, offsets, padded_sizes, [each["boxes"] for each in targets])
        proposed = self.rpn_head.proposals(scores, offsets, image_sizes, self.training_proposals)
        return losses | self.roi_head.losses(maps, [boxes for boxes, _ in proposed], targets)

    def detect(
        self, images: Tensor, image_sizes: Sequence[Sequence[int]], output_sizes: Sequence[Sequence[int]]
    ) -> list[dict[str, Tensor]]:
        """Predictions as of `forward`, but with `mask_logits` (n, 28, 28) in the boxes, of which the method `masks`
        makes masks few at a time: a hundred of a photograph's size are gigabytes."""
        maps = self.pyramid(images)
        scores, offsets = self.rpn_head(maps)
        proposed = self.rpn_head.proposals(scores, offsets, image_sizes, self.proposals)
        predictions = self.roi_head.predict(maps, [boxes for boxes, _ in proposed], image_sizes, self.predictions)
        for each, size, wanted in zip(predictions, image_sizes, output_sizes, strict=True):
            scale = [wanted[1] / size[1], wanted[0] / size[0]] * 2
            each["boxes"] = each["boxes"] * each["boxes"].new_tensor(scale)
        return predictions

    def masks(self, found: Mapping[str, Tensor], size: Sequence[int]) -> Iterator[Tensor]:
        """The masks (n, H, W) of what `detect` found in an image of `size`, some at a time, True where it is."""
        return pasted_in_parts(found["mask_logits"], found["boxes"], size, self.predictions.mask_thr)


def _sizes(
    name: str, sizes: Sequence[Sequence[int]] | None, images: Tensor, within: bool = True
) -> list[tuple[int, int]]:
    """The argument `name` of `MaskRCNN.forward` as numbers; see there.  `within`: they are sides of parts of images."""
    batch = tuple(images.shape[2:])
    if sizes is None:
        return [batch] * len(images)
    if len(sizes) != len(images):
        raise UserError(f"there are {len(sizes)} {name} for {len(images)} images; give (height, width) for each")
    most = batch if within else (math.inf, math.inf)
    found = []
    for number, size in enumerate(sizes):
        try:
            height, width = map(operator.index, size)
        except (TypeError, ValueError):
            raise UserError(f"{name}[{number}] is {size!r:.60}; expected two whole numbers, (height, width)") from None
        if not (1 <= height <= most[0] and 1 <= width <= most[1]):
            place = f", in images of {batch[0]} x {batch[1]} (height, width)" if within else ""
            raise UserError(f"{name}[{number}] is {(height, width)}; expected sides of a pixel or more{place}")
        found.append((height, width))
    return found


def _check_targets(
    targets: Sequence[Target], images: Tensor, image_sizes: Sequence[Sequence[int]], num_classes: int
) -> None:
    """See `MaskRCNN.forward`.  Waits for the device once, when it has nothing to do yet."""
    if not isinstance(targets, Sequence):
        raise UserError(f"targets are a {type(targets).__name__}; give a list of one for each image")
    if len(targets) != len(images):
        raise UserError(f"there are {len(targets)} targets for {len(images)} images; give one for each")
    for number, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise UserError(f"targets[{number}] is a {type(target).__name__}; expected boxes, labels and masks by name")
        missing = {"boxes", "labels", "masks"} - target.keys()
        if missing:
            raise UserError(f"targets[{number}] lacks {', '.join(sorted(missing))}; give boxes, labels and masks")
        for name in ("boxes", "labels", "masks"):
            if not isinstance(target[name], Tensor):
                kind = type(target[name]).__name__
                raise UserError(f"targets[{number}]['{name}'] is a {kind}; expected a tensor")
        count = target["boxes"].shape[0] if target["boxes"].ndim else 0
        for name, shape in (("boxes", (count, 4)), ("labels", (count,)), ("masks", (count, *images.shape[2:]))):
            if target[name].shape != shape:
                raise UserError(
                    f"targets[{number}]['{name}'] has the shape {tuple(target[name].shape)}; expected {shape}, for "
                    f"{count} boxes in images of {images.shape[2]} x {images.shape[3]} (height, width)"
                )
        if target["labels"].dtype != torch.int64:
            raise UserError(f"targets[{number}]['labels'] is of {target['labels'].dtype}; expected int64")
    labels = torch.cat([target["labels"] for target in targets])
    if len(labels):
        whole = torch.cat(
            [_are_boxes(target["boxes"], size) for target, size in zip(targets, image_sizes, strict=True)]
        )
        least, most, right = torch.stack([*labels.aminmax(), whole.all().long()]).tolist()
        if least < 0 or most >= num_classes:
            wrong = least if least < 0 else most
            raise UserError(f"a label is {wrong}, and the model has {num_classes} classes, counted from 0")
        if not right:
            _tell_wrong_box(targets, image_sizes)


def _are_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Which of (N, 4) are finite, have an area, and lie at least in part in an image of `size` (h, w)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    inside = (x1 < size[1]) & (y1 < size[0]) & (x2 > 0) & (y2 > 0)
    return boxes.isfinite().all(1) & (x2 > x1) & (y2 > y1) & inside


def _tell_wrong_box(targets: Sequence[Target], image_sizes: Sequence[Sequence[int]]) -> None:
    for number, (target, (height, width)) in enumerate(zip(targets, image_sizes, strict=True)):
        wrong = target["boxes"][~_are_boxes(target["boxes"], (height, width))].tolist()
        if wrong:
            raise UserError(
                f"targets[{number}]['boxes'] holds {wrong[0]}; expected finite x1, y1, x2, y2 in pixels with x1 < x2 "
                f"and y1 < y2, in an image of {height} x {width} (height, width)"
            )
