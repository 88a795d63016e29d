"""UperNet (arXiv 1807.10221) on any backbone, with the auxiliary FCN head: mmsegmentation's, under its names.

The parts have the names of the released files, so that those need no mapping but the backbone's.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.errors import UserError
from vmamba.models.layers import take_strides_of_gradients
from vmamba.models.whole import check_images
from vmamba.values import Takes

_LEAST = 4  # pixels a side that any backbone takes; a smaller image gets zeros at its right and bottom


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear between the centres of pixels."""
    if _in_training_on_a_gpu(x):
        return _products(x, size, F.interpolate, mode="linear", align_corners=False)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Pool(nn.Module):
    """(B, C, H, W) -> (B, C, side, side), the means of parts."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        size = (self.side, self.side)
        if _in_training_on_a_gpu(x):
            return _products(x, size, F.adaptive_avg_pool1d)
        return F.adaptive_avg_pool2d(x, size)


def _in_training_on_a_gpu(x: Tensor) -> bool:
    """There PyTorch's backward of resizing and of pooling adds up with atomic operations: it took half of a training
    step, and gives other bits each time (docs/log.md)."""
    return x.is_cuda and x.requires_grad


def _products(x: Tensor, size: Sequence[int], line: Callable[..., Tensor], **options: Any) -> Tensor:
    """What works on lines of pixels, (1, n, H) -> (1, n, H'), along both sides of x, as two matrix products in float32.

    Its matrix is what it makes of each pixel alone.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (
            line(torch.eye(before, device=x.device)[None], after, **options)[0]  # (H, H') and (W, W')
            for before, after in zip(x.shape[2:], size, strict=True)
        )
        return torch.matmul(torch.matmul(x.float().mT, rows).mT, columns)


class ConvModule(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, side: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, side, padding=side // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class UperHead(nn.Module):
    """Pyramid pooling over the last map, a top-down pyramid over all, and one prediction from them together.

    Args:
        in_channels: of the maps, the finest first.
        pool_scales: sides of the pyramid's pooled maps.
        dropout: of whole channels before the prediction.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        *finer, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(Pool(scale), ConvModule(last, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(last + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels, 1) for dim in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvModule(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H, W), the finest first -> logits (B, classes, H, W) of the finest's size."""
        *finer, last = maps
        pooled = [resize(part(last), last.shape[2:]) for part in self.psp_modules]
        coarsest = self.bottleneck(torch.cat([last, *pooled], 1))
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)] + [coarsest]
        for level in range(len(finer) - 1, -1, -1):
            laterals[level] = laterals[level] + resize(laterals[level + 1], laterals[level].shape[2:])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + [coarsest]
        together = torch.cat([resize(x, levels[0].shape[2:]) for x in levels], 1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(together)))


class FCNHead(nn.Module):
    """One convolution and a prediction from one map: helps training, and is not used after it."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.convs = nn.ModuleList([ConvModule(in_channels, channels, 3)])
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, classes, H, W)."""
        return self.conv_seg(self.dropout(self.convs[0](x)))


class UperNet(nn.Module):
    """A segmenter.

    Args:
        backbone: (B, 3, H, W) -> four maps, the finest first, of `backbone.channels`.
        channels, aux_channels: of the heads.
        ignore_index: label of pixels that do not count.
        aux_weight: of the auxiliary head's loss; it reads the third map.
        init_std: deviation of the weights of the predictions, at random before training.
    """

    takes = MappingProxyType(
        {
            **dict.fromkeys(("num_classes", "channels", "aux_channels"), Takes((int,), at_least=1)),
            "pool_scales": Takes(([int],), at_least=1),
            "ignore_index": Takes((int,)),
            **dict.fromkeys(("aux_weight", "init_std"), Takes((float,), at_least=0)),
            "dropout": Takes((float,), at_least=0, at_most=1),
        }
    )
    class_layers = ("decode_head.conv_seg", "auxiliary_head.conv_seg")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 512,
        aux_channels: int = 256,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        ignore_index: int = 255,
        aux_weight: float = 0.4,
        dropout: float = 0.1,
        init_std: float = 0.01,
    ):
        super().__init__()
        self.num_classes, self.ignore_index, self.aux_weight = num_classes, ignore_index, aux_weight
        self.backbone = backbone
        self.decode_head = UperHead(backbone.channels, num_classes, channels, pool_scales, dropout)
        self.auxiliary_head = FCNHead(backbone.channels[2], num_classes, aux_channels, dropout)
        for head in (self.decode_head, self.auxiliary_head):
            head.apply(_initialise)
            nn.init.normal_(head.conv_seg.weight, std=init_std)
            nn.init.zeros_(head.conv_seg.bias)
        take_strides_of_gradients(self.decode_head, self.auxiliary_head)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(B, 3, H, W) -> logits (B, classes, H, W); with `targets` (B, H, W), integers, the losses by name.

        `decode.loss_ce` and `aux.loss_ce` are to be added up; `decode.acc_seg` and `aux.acc_seg` are percent of the
        pixels that count.  Raises UserError for images that are no batch, for targets that are not one integer for each
        pixel, or on a CPU, where looking at them makes nobody wait, of no class, and for a single image in training.
        """
        check_images(images, self.decode_head.conv_seg.weight, "segmenter")
        if targets is not None:
            _check_targets(targets, images, self.num_classes, self.ignore_index)
        if self.training and len(images) == 1:
            _check_norms(self)
        height, width = images.shape[2:]
        maps = self.backbone(F.pad(images, (0, max(0, _LEAST - width), 0, max(0, _LEAST - height))))
        logits = self.decode_head(maps)
        if targets is None:
            return resize(logits, images.shape[2:])
        auxiliary = self.auxiliary_head(maps[2])
        return self._losses("decode", logits, targets, 1.0) | self._losses("aux", auxiliary, targets, self.aux_weight)

    def _losses(self, name: str, logits: Tensor, targets: Tensor, weight: float) -> dict[str, Tensor]:
        logits, targets = resize(logits.float(), targets.shape[1:]), targets.long()
        # The mean is over all pixels, those that do not count included, as in mmsegmentation.
        losses = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="none")
        counts = targets != self.ignore_index
        right = (logits.detach().argmax(1) == targets) & counts
        accuracy = 100 * right.sum() / counts.sum().clamp(min=1)
        return {f"{name}.loss_ce": weight * losses.mean(), f"{name}.acc_seg": accuracy}


def _check_norms(model: UperNet) -> None:
    for pool, conv in model.decode_head.psp_modules:
        if (
            pool.side == 1 and isinstance(conv.bn, nn.BatchNorm2d) and conv.bn.training
        ):  # SyncBatchNorm is another class
            raise UserError(
                "a single image cannot be trained on: its coarsest pooled map is one pixel, too little for its batch "
                "norm; give two or more, or call model.eval()"
            )


def _check_targets(targets: Tensor, images: Tensor, num_classes: int, ignored: int) -> None:
    """See `UperNet.forward`."""
    if not isinstance(targets, Tensor):
        raise UserError(f"targets are a {type(targets).__name__}; expected a tensor")
    expected = (len(images), *images.shape[2:])
    if tuple(targets.shape) != expected:
        raise UserError(f"targets have the shape {tuple(targets.shape)}; expected {expected}, a label for each pixel")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise UserError(f"targets are of {targets.dtype}; expected integers")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        counting = targets[targets != ignored]
        for wrong in (counting[counting >= num_classes], counting[counting < 0]):
            if len(wrong):
                raise UserError(
                    f"targets hold label {wrong[0].item()}; the model has {num_classes} classes, counted from 0, and "
                    f"label {ignored} does not count"
                )


def _initialise(module: nn.Module) -> None:
    """Convolutions by He's normal rule, as mmsegmentation."""
    if isinstance(module, ConvModule):
        nn.init.kaiming_normal_(module.conv.weight, nonlinearity="relu")
