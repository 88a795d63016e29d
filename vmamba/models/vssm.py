"""VSSM, the visual state-space model: a stem, four stages of blocks with downsampling between them, a classifier.

Images come in as (B, in_chans, H, W); inside, features are channels last, (B, H, W, C): see `layers`.
State-dict keys are those of the released files of 2024 (`layers.0.blocks.0.op.x_proj_weight`, ...).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmamba.errors import UserError, unknown
from vmamba.models import casting, freezing, layers
from vmamba.models.options import BlockOptions, ModelOptions, ScanOptions, of_block, signed_by
from vmamba.models.ss2d import SS2D, SSD2D, Mixer2D
from vmamba.text import counted
from vmamba.values import Takes
from vmamba_kernels import autocast_dtype
from vmamba_kernels.private import MATCH_PREV_GROUP, feature_take_indices

SCANS = {"selective": SS2D, "ssd": SSD2D}


class Block(nn.Module):
    """x + op(norm(x)), then x + mlp(norm2(x)) where there is an MLP; stochastic depth on both branches."""

    @signed_by(BlockOptions)
    def __init__(self, dim: int, options: BlockOptions | None = None, drop_path: float = 0.0, **changes: Any):
        """Args:
            dim: channels in and out.
            options: what can be chosen, or `changes` of it by name: see `options.BlockOptions`.
            drop_path: probability of leaving out a branch in training.

        Raises UserError: an option is unknown, or its value impossible; in `forward`, features do not fit.
        """
        super().__init__()
        o = (options or BlockOptions()).changed(**changes)
        drop_path = ModelOptions(drop_path_rate=drop_path).drop_path_rate  # in bounds
        norm = layers.norm_layer(o.norm_layer)
        op = SCANS[o.scan](dim, o)
        mlp = layers.mlp(dim, o.mlp_ratio, o.mlp_act, o.mlp_drop_rate, o.gated_mlp) if o.mlp_ratio else None
        self.norm = norm(dim)  # optimisers' states in files count on this order of the parts
        self.op = op
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm(dim) if o.mlp_ratio else None
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        layers.check_channels_last(x, self.op.dim, "Block")
        x, branch = self.before_the_sum(x, layers.on_channels_last(self.norm, x))
        return x + self.drop_path(branch)

    def before_the_sum(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """x and norm(x) -> what the block adds up in the end, the second through `drop_path`."""
        if not casting.pays(x):
            return self._before_the_sum(x, normed)
        with casting.weights_cast_once(self, autocast_dtype(x.device.type)):
            return self._before_the_sum(x, normed)

    def _before_the_sum(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.op(normed)
        if self.mlp is None:
            return x, branch
        x, normed = layers.add_and_norm(x, branch, self.drop_path, self.norm2)
        return x, layers.through_mlp(self.mlp, normed)


class Blocks(nn.Sequential):
    """Blocks one behind the other: the last sum of each and the norm of the next are one operator, unless a block is of
    another kind or somebody watches it."""

    def forward(self, x: Tensor) -> Tensor:
        if not (len(self) and all(type(block) is Block for block in self) and layers.is_unseen(x, *self)):
            return super().forward(x)
        normed = layers.on_channels_last(self[0].norm, x)
        for block, following in pairwise(self):
            x, normed = layers.add_and_norm(*block.before_the_sum(x, normed), block.drop_path, following.norm)
        x, branch = self[-1].before_the_sum(x, normed)
        return x + self[-1].drop_path(branch)


class Stage(nn.Module):
    """Blocks at one resolution, then the downsampling to the next stage (none after the last)."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module | None):
        super().__init__()
        self.blocks = Blocks(*blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """The blocks alone: (B, H, W, dim) -> (B, H, W, dim)."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Classifier(nn.Module):
    """Norm, global average pool, linear."""

    def __init__(self, dim: int, num_classes: int, norm: nn.Module, pool: str, drop_rate: float):
        super().__init__()
        self.dim = dim
        self.norm = norm
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool)

    def reset(self, num_classes: int, pool: str) -> None:
        self.pool = pool
        self.head = nn.Linear(self.dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, dim) -> (B, num_classes), or (B, dim) with `pre_logits`; unpooled with pool ''."""
        x = layers.on_channels_last(self.norm, x)
        if self.pool == "avg":
            x = x.mean((1, 2))
        x = self.drop(x)
        return x if pre_logits else self.head(x)


class VSSM(layers.Unscripted, nn.Module):
    """The model of VMamba (arXiv 2401.10166); see `variants` for the options of the published ones.

    Args: see `options.ModelOptions`.

    Raises:
        UserError: an option is unknown, or its value impossible; in `forward`, the image does not fit.
    """

    output_fmt = "NHWC"  # of forward_features, as timm names it

    @signed_by(ModelOptions)
    def __init__(
        self,
        num_classes: int = ModelOptions.num_classes,
        in_chans: int = ModelOptions.in_chans,
        img_size: int | tuple[int, int] = ModelOptions.img_size,
        global_pool: str = ModelOptions.global_pool,
        **options: Any,
    ):
        super().__init__()
        o = ModelOptions().changed(
            num_classes=num_classes, in_chans=in_chans, img_size=img_size, global_pool=global_pool, **options
        )
        dims = [o.dims * 2**i for i in range(len(o.depths))] if isinstance(o.dims, int) else list(o.dims)
        if len(dims) != len(o.depths) or not dims:
            raise UserError(
                f"dims has {counted(len(dims), 'stage')} and depths {len(o.depths)}; give both one number a stage"
            )
        o.changed(dims=dims)  # in bounds after doubling too
        self.options = o  # as they were given; the classifier may have become another
        norm = layers.norm_layer(o.norm_layer)
        self.num_classes, self.in_chans, self.dims, self.patch_size = o.num_classes, o.in_chans, dims, o.patch_size
        self.norm_layer = o.norm_layer
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=o.patch_size * 2**i, module=f"layers.{i}.blocks") for i, dim in enumerate(dims)
        ]
        self.patch_embed = layers.patch_embed(
            o.patch_embed, o.in_chans, dims[0], o.patch_size, norm if o.patch_norm else nn.Identity
        )
        self.pos_embed = _position_map(o.img_size, o.patch_size, dims[0]) if o.pos_embed else None

        rates = [o.drop_path_rate * i / max(sum(o.depths) - 1, 1) for i in range(sum(o.depths))]
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, o.depths, strict=True)):
            first = sum(o.depths[:i])
            blocks = [Block(dim, of_block(o, number), rates[number]) for number in range(first, first + depth)]
            stages.append(
                Stage(blocks, layers.downsample(o.downsample, dim, dims[i + 1], norm) if dims[i + 1 :] else None)
            )
        self.layers = nn.ModuleList(stages)
        self.classifier = Classifier(
            dims[-1], o.num_classes, norm(dims[-1], keep_float32=True), o.global_pool, o.drop_rate
        )
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H', W', dims[-1]), the last stage's output before the classifier's norm."""
        x = self._stem(x)
        for stage in self.layers:
            x = self._downsample(stage, stage(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H', W', dims[-1]) -> (B, num_classes); with `pre_logits` the pooled features, (B, dims[-1])."""
        return self._classifier()(x, pre_logits)

    def _stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H', W', dims[0])."""
        first = self.patch_embed[0]
        _check_images(x, self.in_chans, first.weight, first.kernel_size[0], first.padding[0])
        # The memory of a "channels_last" image, written so that torch.vmap takes it.
        x = self.patch_embed(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, x.shape[1:3]).permute(0, 2, 3, 1)
        return x

    def _downsample(self, stage: Stage, x: Tensor) -> Tensor:
        """To the next stage's resolution; after the last stage x itself."""
        if stage.downsample is None:
            return x
        if isinstance(stage.downsample, nn.Sequential) and stage.downsample[1].padding[0] == 0:
            _check_features(x)
        return stage.downsample(x)

    # ------------------------------------------------------------------------------------ what timm's models offer

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last features and the outputs of chosen stages, before their downsampling.

        Args:
            x: (B, in_chans, H, W).
            indices: stages, negative ones from the end; a number n means the last n; None means all.
            norm: put the classifier's norm on the last stage's output.
            stop_early: stop behind the blocks of the last chosen stage.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NHWC"))
        take, last = feature_take_indices(len(self.layers), indices)
        x = self._stem(x)
        intermediates = []
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage(x)
            if i in take:
                y = layers.on_channels_last(self._classifier().norm, x) if norm and i == len(self.dims) - 1 else x
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
            if not (stop_early and i == last):
                x = self._downsample(stage, x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices` (as in `forward_intermediates`), and the head."""
        take, last = feature_take_indices(len(self.layers), indices)
        classifier = self._classifier()
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = None
        if prune_norm:
            classifier.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _classifier(self) -> Classifier:
        if self.classifier is None:
            raise UserError("this model has no classifier since a Backbone took it; create another for classification")
        return self.classifier

    def __dir__(self) -> list[str]:
        """Without what a Backbone took: torch.jit.trace asks a module for all that it says it has."""
        taken = ("head", "global_pool") if self.classifier is None else ()
        return [name for name in super().__dir__() if name not in taken]

    @property
    def head(self) -> nn.Module:
        """The classifier's last layer; `model.head = nn.Linear(768, 10)` replaces it."""
        return self._classifier().head

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("fc", "_fc", "heads", "last_linear"):  # of other libraries' models; here nothing would read them
            raise UserError(f"a VSSM has no '{name}'; its last layer is 'head'")
        if name == "classifier" and value is not None and not (hasattr(value, "norm") and hasattr(value, "head")):
            kind = type(value).__name__
            raise UserError(
                f"classifier is a {kind}; a VSSM's is norm, pooling and 'head': set 'head' for a last layer"
            )
        if name != "head":
            return super().__setattr__(name, value)
        if not isinstance(value, nn.Module):
            raise UserError(f"head is {value!r:.60}; give a module, or leave it out with reset_classifier(0)")
        self._classifier().head = value
        widths = [layer.out_features for layer in value.modules() if hasattr(layer, "out_features")]
        self.num_classes = widths[-1] if widths else 0

    @property
    def global_pool(self) -> str:
        return self._classifier().pool

    def get_classifier(self) -> nn.Module:
        return self._classifier().head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pooling if `global_pool` is given.

        Raises UserError for what `options.ModelOptions` does not take; the model stays as it was then.
        """
        classifier = self._classifier()
        o = ModelOptions(num_classes=num_classes, global_pool=classifier.pool if global_pool is None else global_pool)
        self.num_classes = o.num_classes
        classifier.reset(o.num_classes, o.global_pool)
        classifier.head.apply(_init_linear)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def freeze(self, stages: int) -> "VSSM":
        """Let the stem and the first `stages` stages stay as they are, with all of them everything but the head: no
        gradient, no statistics of batch norms, nothing dropped at random, also in training mode.  What an earlier call
        froze beyond that is trained again.

        Returns the model.  Raises UserError for a number of stages that there are not.
        """
        stages = Takes((int,), at_least=0, at_most=len(self.layers)).check("stages", stages)
        freezing.thaw(self)
        if stages == len(self.layers) and self.classifier is not None and [*self.classifier.head.parameters()]:
            freezing.freeze(self, [freezing.ALL_BUT_HEAD], "freeze")
            return self
        position_map = ["pos_embed"] if self.pos_embed is not None else []
        freezing.mark(self, ["patch_embed", *position_map, *(f"layers.{stage}" for stage in range(stages))], "freeze")
        return self

    def train(self, mode: bool = True) -> "VSSM":
        super().train(mode)
        freezing.keep(self)
        return self

    def set_backend(self, backend: str) -> None:
        """Choose the backend of every scan; "auto" is the fastest that can serve a call.  UserError for no backend."""
        ScanOptions().changed(backend=backend)
        for module in self.modules():
            if isinstance(module, Mixer2D):
                module.backend = backend

    def no_weight_decay(self) -> set[str]:
        """Parameters beside norms and biases that the released recipe does not decay: D of SS2D, the position map."""
        names = {f"{path}.Ds" for path, module in self.named_modules() if isinstance(module, SS2D)}
        return names | ({"pos_embed"} if self.pos_embed is not None else set())

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's parameter groups, for layer-wise decay: the stem, each block (stage if `coarse`), the head.

        A stage's downsampling and the classifier's norm belong to the block in front of them.
        """
        blocks = [(r"^layers\.(\d+)", None)]
        if not coarse:
            blocks = [
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^layers\.(\d+)\.downsample", MATCH_PREV_GROUP),
            ]
        return dict(stem=r"^patch_embed|^pos_embed", blocks=[*blocks, (r"^classifier\.norm", MATCH_PREV_GROUP)])


def _position_map(img_size: int | tuple[int, int], patch_size: int, dim: int) -> nn.Parameter:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < patch_size:
        raise UserError(f"img_size is {img_size}; pos_embed needs at least one patch of {patch_size} x {patch_size}")
    pos_embed = nn.Parameter(torch.empty(1, dim, height // patch_size, width // patch_size))
    trunc_normal_(pos_embed, std=0.02)
    return pos_embed


# torch.fx takes what is wrapped so whole: what it does depends on sizes.
@torch.fx.wrap
def _check_images(x: Tensor, in_chans: int, weight: Tensor, side: int, padding: int) -> None:
    """Raises UserError unless the images have `in_chans` channels, numbers like those of the first `weight`, and room
    for one patch of `side` pixels."""
    layers.check_images(x, in_chans, weight)
    if min(x.shape[2:]) + 2 * padding < side:
        raise UserError(
            f"images are {x.shape[2]} x {x.shape[3]} pixels; this model's patches need at least {side} x {side}"
        )


@torch.fx.wrap
def _check_features(x: Tensor) -> None:
    """Raises UserError when features (B, H, W, C) are too small for an unpadded 2x2 convolution."""
    if min(x.shape[1:3]) < 2:
        raise UserError(
            f"a stage's features are {x.shape[1]} x {x.shape[2]}, too small to downsample by 2x2 convolution; "
            f"use larger images or downsample='v3'"
        )


@torch.fx.wrap
def resize_pos_embed(pos_embed: Tensor, size: Sequence[int]) -> Tensor:
    """(1, dim, H, W) -> (1, dim, *size), bicubic without antialiasing, as the released code resizes it on loading."""
    if tuple(pos_embed.shape[2:]) == tuple(size):
        return pos_embed
    return F.interpolate(pos_embed.float(), size=tuple(size), mode="bicubic", align_corners=False).to(pos_embed.dtype)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
