"""Vim (arXiv 2401.09417): a plain stack of bidirectional Mamba layers on patches, the 1-D baseline beside VMamba.

Registered with timm, so `MODEL.NAME timm/vim_tiny_patch16_224` trains it in this loop.  The names of its parameters are
those of its authors' code, so that their weights load (`timm.create_model("vim_tiny_patch16_224", pretrained=True,
pretrained_cfg_overlay=dict(file=...))`).
"""

import inspect
from typing import Any

import torch
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmamba.errors import UserError, unknown
from vmamba.models.layers import check_images
from vmamba.models.mamba1d import Mamba1D
from vmamba.values import Takes

__all__ = ["Vim"]
EPS = 1e-5  # of the norms (arXiv 1910.07467)
_SHARE = Takes((float,), at_least=0, at_most=1)
TAKES = {
    "img_size": Takes((int, [int]), at_least=1, at_most=2**15, length=2),
    "patch_size": Takes((int,), at_least=1, at_most=2**15),
    "in_chans": Takes((int,), at_least=1, at_most=10**4),
    "num_classes": Takes((int,), at_least=0, at_most=10**6),
    "embed_dim": Takes((int,), at_least=1, at_most=2**14),
    "depth": Takes((int,), at_least=1, at_most=1000),
    **dict.fromkeys(("drop_path_rate", "drop_rate"), _SHARE),
}
_MIXER_OPTIONS = {*inspect.signature(Mamba1D).parameters} - {"d_model", "bidirectional"}


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, dim: int, drop_path: float, **options: Any):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.mixer = Mamba1D(dim, bidirectional=True, **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class Vim(nn.Module):
    """Patches with a class token in their middle and learned positions, through `depth` layers; the classifier reads
    the token.

    Args:
        img_size: height and width of the images, which the positions belong to.
        drop_path_rate: of the last layer; those before it rise to it from 0.
        mixer_options: of `Mamba1D`.

    Raises UserError for a value that cannot be, and for images of another size than `img_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        **mixer_options: Any,
    ):
        super().__init__()
        given = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes)
        given |= dict(embed_dim=embed_dim, depth=depth, drop_path_rate=drop_path_rate, drop_rate=drop_rate)
        for name, value in given.items():
            TAKES[name].check(name, value)
        if any(side % patch_size for side in ([img_size] if isinstance(img_size, int) else img_size)):
            raise UserError(f"img_size is {img_size}; its sides must be multiples of patch_size, which is {patch_size}")
        for name in mixer_options:
            if name not in _MIXER_OPTIONS:
                raise unknown("option of Vim", name, {*TAKES, *_MIXER_OPTIONS})
        self.num_classes, self.num_features, self.embed_dim = num_classes, embed_dim, embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        rates = [drop_path_rate * layer / max(1, depth - 1) for layer in range(depth)]
        self.layers = nn.ModuleList(Layer(embed_dim, rate, **mixer_options) for rate in rates)
        self.norm_f = nn.RMSNorm(embed_dim, eps=EPS)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        if num_classes:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for layer in self.layers:  # as GPT-2: the sum of so many branches keeps its size
            with torch.no_grad():
                layer.mixer.out_proj.weight /= depth**0.5

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, patches + 1, embed_dim), the class token at (patches) // 2."""
        x = _checked(
            x, self.patch_embed.proj.in_channels, self.patch_embed.proj.weight, tuple(self.patch_embed.img_size)
        )
        x = self.patch_embed(x)
        before, behind = x.tensor_split([x.shape[1] // 2], dim=1)
        x = torch.cat((before, self.cls_token.expand(x.shape[0], -1, -1), behind), dim=1) + self.pos_embed
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing and self.training else layer(x)
        return self.norm_f(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(x[:, (x.shape[1] - 1) // 2])
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    # What timm's models have, for what is written for them.

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, token, and what the scans decay by."""
        scans = {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".A_b_log", ".D", ".D_b"))}
        return {"pos_embed", "cls_token"} | scans

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for rates that fall layer by layer."""
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        )

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = TAKES["num_classes"].check("num_classes", num_classes)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()


@torch.fx.wrap  # torch.fx takes what is wrapped so whole: it depends on shapes
def _checked(images: Tensor, channels: int, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """`images`.  Raises UserError for what is no batch of images of these channels, numbers and this size."""
    check_images(images, channels, weight)
    if tuple(images.shape[2:]) != size:
        raise UserError(
            f"images of {images.shape[2]} x {images.shape[3]} pixels; this model has positions for {size[0]} x "
            f"{size[1]}, give img_size when it is made"
        )
    return images


def _to_size(state_dict: dict[str, Tensor], model: Vim) -> dict[str, Tensor]:
    """Weights of a file for `model`, positions resized where its images have another size."""
    weights = state_dict.get("model", state_dict)
    positions, own = weights.get("pos_embed"), model.pos_embed
    if positions is None or positions.shape == own.shape:
        return weights
    middle = (positions.shape[1] - 1) // 2
    patches = torch.cat((positions[:, :middle], positions[:, middle + 1 :]), dim=1)
    size = list(model.patch_embed.grid_size)
    patches = resample_abs_pos_embed(patches, new_size=size, num_prefix_tokens=0)
    middle_now = patches.shape[1] // 2
    resized = torch.cat((patches[:, :middle_now], positions[:, middle : middle + 1], patches[:, middle_now:]), dim=1)
    return {**weights, "pos_embed": resized}


default_cfgs = generate_default_cfgs(
    {
        name: dict(
            url="", num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9, interpolation="bicubic",
            fixed_input_size=True, first_conv="patch_embed.proj", classifier="head", paper_ids="arXiv:2401.09417",
            paper_name="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
            origin_url="https://github.com/hustvl/Vim",
        )
        for name in ("vim_tiny_patch16_224", "vim_small_patch16_224")
    }
)  # fmt: skip


def _build(variant: str, pretrained: bool, **options: Any) -> Vim:
    if options.get("features_only"):
        raise UserError(
            f"features_only: {variant} has one resolution and no stages, so there are no feature maps to choose from; "
            "its tokens are what model.forward_features(images) gives"
        )
    return build_model_with_cfg(Vim, variant, pretrained, pretrained_filter_fn=_to_size, **options)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **options: Any) -> Vim:
    """Vim-Ti: 7M parameters."""
    return _build("vim_tiny_patch16_224", pretrained, **dict(embed_dim=192, depth=24) | options)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **options: Any) -> Vim:
    """Vim-S: 26M parameters."""
    return _build("vim_small_patch16_224", pretrained, **dict(embed_dim=384, depth=24) | options)
