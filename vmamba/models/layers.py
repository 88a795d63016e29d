"""The parts around the scan, on channels-last images (batch, height, width, channels).

Channels last is the one layout of these models: a scan kernel whose neighbouring threads hold neighbouring channels
reads whole cache lines along every route, linear layers and LayerNorm need no permutation, and a convolution reads the
same memory as a "channels_last" image.  The indices inside the `nn.Sequential`s below are those of the released files.
"""

from collections.abc import Callable
from typing import NoReturn

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import DropPath, GluMlp, Mlp, get_act_layer
from torch import Tensor, nn

import vmamba_kernels
from vmamba.errors import UserError
from vmamba_kernels import add_layer_norm, autocast_dtype, gelu_mlp, is_plain, is_seen_into, layer_norm
from vmamba_kernels.private import has_hooks

ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid", "tanh", "softplus")
NORMS = ("ln", "bn")
OUT_NORMS = ("ln", "none", "softmax", "sigmoid", "dwconv3", "ln_dwconv3")
PATCH_EMBEDS = ("v1", "v2")
DOWNSAMPLES = ("v1", "v2", "v3")


@torch.fx.wrap  # what it does depends on sizes
def check_channels_last(x: Tensor, dim: int, what: str) -> None:
    """Raises UserError for what is no floating-point numbers of (B, H, W, dim), or has no pixel."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_quantized):
        given = f"of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise UserError(f"x is {given}; this {what} takes a tensor (batch, height, width, {dim}) of floating point")
    if x.dim() == 4 and x.shape[-1] == dim:
        if x.shape[1] and x.shape[2]:
            return
        raise UserError(f"x has the shape {tuple(x.shape)}, which has no pixel; this {what} takes one or more")
    first = x.dim() == 4 and x.shape[1] == dim
    remedy = "; its channels come first: give it x.permute(0, 2, 3, 1)" if first else ""
    raise UserError(f"x has the shape {tuple(x.shape)}, and this {what} takes (batch, height, width, {dim}){remedy}")


class Unscripted:
    """Of a module: torch.jit.script, which compiles Python's text, refuses it and all that it is in by one sentence."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise UserError(
            f"torch.jit.script cannot compile a {type(self).__name__}; use torch.jit.trace or torch.export, or "
            f"vmamba.export for a whole model"
        )


@torch.fx.wrap
def check_images(images: Tensor, channels: int, weight: Tensor) -> None:
    """Raises UserError for what is no batch of images of these channels, in floating-point numbers like those of the
    `weight` that they meet."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = f"of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UserError(
            f"images are {what}; this model takes a tensor of floating-point numbers, normalised as its own"
        )
    if images.dim() != 4 or images.shape[1] != channels:
        raise UserError(f"images have shape {tuple(images.shape)}; this model takes (batch, {channels}, height, width)")
    if not go_together(images, weight):
        raise UserError(f"images are of {images.dtype}, and the weights of {weight.dtype}; give them in that type")


def go_together(x: Tensor, weight: Tensor) -> bool:
    """Whether `x` and `weight` are of numbers that one product takes, or that autocast makes so; what is quantised
    takes what it takes."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or x.dtype == weight.dtype:
        return True
    casts = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    return casts and x.is_floating_point()


class ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)


class LayerNorm(Unscripted, nn.LayerNorm):
    """LayerNorm over the channels, computed in float32 whatever it reads.

    Under autocast it gives the dtype that the next layer would cast to anyway, which halves what is written; with
    `keep_float32`, where no such layer follows, it gives float32 as PyTorch's does.
    """

    def __init__(self, dim: int, keep_float32: bool = False):
        super().__init__(dim)
        self.keep_float32 = keep_float32

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self.weight, self.bias, self.eps, self.keep_float32)


@torch.fx.wrap  # torch.fx takes what is wrapped so whole: what it does depends on sizes or on autocast
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_float32: bool) -> Tensor:
    return layer_norm(x, weight, bias, eps=eps, out_dtype=_norm_dtype(x, keep_float32))


def is_unseen(x: Tensor, *modules: nn.Module) -> bool:
    """Whether nobody sees what goes into `modules` and comes out: no hook, no torch.fx, nothing in a module's place."""
    return not isinstance(x, torch.fx.Proxy) and not any(has_hooks(module) for module in modules)


def add_and_norm(x: Tensor, branch: Tensor, drop_path: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + drop_path(branch), and the norm of that: one operator, where both modules are as we make them, and unseen."""
    ours = type(norm) is LayerNorm and type(drop_path) is DropPath and is_unseen(x, norm, drop_path)
    if not ours or branch.shape != x.shape:
        x = x + drop_path(branch)
        return x, on_channels_last(norm, x)
    factor = None
    if drop_path.training and drop_path.drop_prob:  # drawn as DropPath does
        kept = 1 - drop_path.drop_prob
        factor = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(kept)
        if kept and drop_path.scale_by_keep:
            factor.div_(kept)
    dtype = _norm_dtype(x, norm.keep_float32)
    return add_layer_norm(x, branch, norm.weight, norm.bias, factor=factor, eps=norm.eps, out_dtype=dtype)


def _norm_dtype(x: Tensor, keep_float32: bool) -> torch.dtype | None:
    dtype = autocast_dtype(x.device.type)
    return torch.float32 if dtype is not None and keep_float32 else dtype


def batch_norm(dim: int, keep_float32: bool = False) -> nn.BatchNorm2d:
    """PyTorch's own, so that what converts, freezes or splits batch norms knows it; `on_channels_last` runs it.

    Under autocast it gives what it reads, `keep_float32` or not.
    """
    return nn.BatchNorm2d(dim)


# Norms of channels-first images beside batch norms: PyTorch's, and those that timm calls so (LayerNorm2d, ...).
_IMAGE_NORMS = (
    nn.GroupNorm,
    nn.LocalResponseNorm,
    *(each for name, each in vars(timm.layers).items() if "Norm" in name and "2d" in name and isinstance(each, type)),
)


def on_channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer on channels-last images.

    A norm of images of any make, which may have come in the place of ours, reads them channels first: a batch norm
    (its statistics tell it) and `_IMAGE_NORMS`.
    """
    if isinstance(layer, LayerNorm):  # what follows takes a microsecond
        return layer(x)
    if hasattr(layer, "running_mean") or isinstance(layer, _IMAGE_NORMS):
        return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer(x)


class ImageLayers(nn.Sequential):
    """Layers one behind the other, each through `on_channels_last`."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = on_channels_last(layer, x)
        return x


def depthwise_conv(dim: int, side: int, bias: bool) -> nn.Conv2d:
    """A convolution of each channel of channels-first images that keeps their size."""
    convolution = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim, bias=bias)
    take_strides_of_gradients(convolution)
    return convolution


def convolve_and_activate(x: Tensor, convolution: nn.Module, act: nn.Module) -> Tensor:
    """act(convolution(x)) of a channels-last image: one operator where both are as we make them, and unseen."""
    if type(act) is nn.SiLU and is_unseen(x, convolution, act) and _keeps_size_and_channels(convolution):
        return vmamba_kernels.depthwise_conv(x, convolution.weight, convolution.bias, silu=True)
    return act(convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _keeps_size_and_channels(layer: nn.Module) -> bool:
    """Whether it is what `depthwise_conv` makes, also after somebody may have changed its stride or dilation."""
    if type(layer) is not nn.Conv2d or not layer.groups == layer.in_channels == layer.out_channels:
        return False
    side = layer.kernel_size[0]
    of_a_square = layer.kernel_size == (side, side) and layer.padding == (side // 2, side // 2) and side % 2 == 1
    return of_a_square and layer.stride == layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def take_strides_of_gradients(*modules: nn.Module) -> None:
    """Give weights of convolutions the strides that their gradients have on channels-last images, where that is the
    same memory (one channel to read, or 1x1): DistributedDataParallel compares strides, and warns."""
    for layer in (layer for module in modules for layer in module.modules() if isinstance(layer, nn.Conv2d)):
        _, channels, height, width = shape = layer.weight.shape
        if channels == 1 or height == width == 1:
            strides = (height * width * channels, 1, width * channels, channels)
            layer.weight.data = layer.weight.data.as_strided(shape, strides)


class StridedConv(nn.Conv2d):
    """A convolution that makes an image smaller.

    Two kinds PyTorch takes long for are a product with the image's patches here (docs/log.md).  On a CPU it lays the
    weights out anew in every call, which are megabytes where the image is small: the product takes half the time.  On
    a GPU three channels leave its half-precision kernels idle; what the product takes there is part of what was
    measured of a whole step, and was not timed alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _strided_conv(x, self.weight, self.bias, self.stride[0], self.padding[0])


@torch.fx.wrap
def _strided_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    if _is_better_as_product(x, weight):
        return _product_with_patches(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


def _is_better_as_product(x: Tensor, weight: Tensor) -> bool:
    if x.device.type == "cpu":
        return is_plain() and weight.numel() > max(2**21, 8 * x.numel())
    dtype = autocast_dtype(x.device.type) or x.dtype
    few = weight.shape[1:].numel() < 64 and not x.requires_grad  # the gradient of an image would be unfolded slowly
    return x.device.type == "cuda" and few and dtype.itemsize == 2 and not is_seen_into()


def _product_with_patches(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    if x.device.type == "cuda":
        x = x.to(autocast_dtype("cuda") or x.dtype)
    side = weight.shape[2]
    windows = F.pad(x, (padding,) * 4).unfold(2, side, stride).unfold(3, side, stride)  # (B, C, H', W', k, k)
    patches, weight = windows.permute(0, 2, 3, 1, 4, 5).flatten(3), weight.flatten(1)  # (B, H', W', C k k)
    if patches.shape[3] % 8:  # the fast products want rows of 16 bytes
        patches, weight = (F.pad(t, (0, -t.shape[-1] % 8)) for t in (patches, weight))
    return F.linear(patches, weight, bias).permute(0, 3, 1, 2)


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


def activation(name: str) -> Callable[[], nn.Module]:
    """The class of an activation by its name, one of `ACTIVATIONS`."""
    return nn.Softplus if name == "softplus" else get_act_layer(name)


def norm_layer(name: str) -> Callable[..., nn.Module]:
    """What makes a norm, by its name: "ln" over channels, "bn" over the batch; see `on_channels_last`."""
    return LayerNorm if name == "ln" else batch_norm


def out_norm(name: str, dim: int) -> nn.Module:
    """What follows the scan, one of `OUT_NORMS`."""
    if name == "ln":
        return LayerNorm(dim)
    if name == "none":
        return nn.Identity()
    if name == "softmax":
        return SpatialSoftmax()
    if name == "sigmoid":
        return nn.Sigmoid()
    convolution = (ToChannelsFirst(), depthwise_conv(dim, 3, bias=False), ToChannelsLast())
    return ImageLayers(*convolution) if name == "dwconv3" else ImageLayers(LayerNorm(dim), *convolution)


def mlp(dim: int, ratio: float, act: str, drop: float, gated: bool) -> nn.Module:
    """fc1, activation, fc2; gated, fc1 is twice as wide and gives (x, z), and fc2 takes x * act(z)."""
    hidden = int(dim * ratio)
    if hidden < 1:
        raise UserError(f"mlp_ratio is {ratio}, which of {dim} channels leaves none; choose more, or 0 for no MLP")
    if gated:
        return GluMlp(dim, 2 * hidden, act_layer=activation(act), drop=drop, gate_last=True)
    return Mlp(dim, hidden, act_layer=activation(act), drop=drop)


def through_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """mlp(x): one operator where it is what `mlp` makes with GELU, drops nothing, and is unseen."""
    if type(mlp) is not Mlp or not _is_gelu(mlp.act) or not is_unseen(x, *mlp.modules()):
        return mlp(x)
    layers = mlp.fc1, mlp.fc2
    plain = all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
    drops = mlp.training and any(drop.p for drop in (mlp.drop1, mlp.drop2))
    if not plain or drops or type(mlp.norm) is not nn.Identity:
        return mlp(x)
    return gelu_mlp(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)


def _is_gelu(act: nn.Module) -> bool:
    """The exact one; timm's classes have no choice."""
    return type(act) in (nn.GELU, activation("gelu")) and getattr(act, "approximate", "none") == "none"


def patch_embed(version: str, in_chans: int, dim: int, patch_size: int, norm: Callable[..., nn.Module]) -> nn.Module:
    """(B, in_chans, H, W) -> (B, H', W', dim).

    "v1": one convolution over patches, so H' = H // patch_size; "v2": two 3x3 convolutions of stride 2, a norm and GELU
    between them, so H' = ceil(H / 4), for patch_size 4 alone as in the original.  Raises UserError where it cannot be.
    """
    if version == "v1":
        return ImageLayers(
            StridedConv(in_chans, dim, patch_size, patch_size), ToChannelsLast(), norm(dim, keep_float32=True)
        )
    if patch_size != 4:
        raise UserError(
            f"patch_size is {patch_size}; patch_embed 'v2' has stride 4, so choose that or patch_embed 'v1'"
        )
    if dim < 2:
        raise UserError(f"dims starts with {dim}; patch_embed 'v2' halves it, so choose a larger one or 'v1'")
    return ImageLayers(
        StridedConv(in_chans, dim // 2, 3, stride=2, padding=1),
        ToChannelsLast(),
        norm(dim // 2),
        ToChannelsFirst(),
        nn.GELU(),
        StridedConv(dim // 2, dim, 3, stride=2, padding=1),
        ToChannelsLast(),
        norm(dim, keep_float32=True),
    )


class PatchMerging(nn.Module):
    """Downsampling "v1" (Swin's): the channels of 2x2 pixels, norm, linear; an odd side is padded with zeros.

    Under autocast it ends in a linear layer, so the sums behind it are in autocast's dtype, as in the original; "v2"
    and "v3" end in a norm, which gives float32.
    """

    def __init__(self, dim: int, out_dim: int, norm: Callable[..., nn.Module]):
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # (B, H/2, row, W/2, column, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C), pixels ordered (0,0), (1,0), (0,1), (1,1)
        return self.reduction(on_channels_last(self.norm, x))


def downsample(version: str, dim: int, out_dim: int, norm: Callable[..., nn.Module]) -> nn.Module:
    """(B, H, W, dim) -> (B, H', W', out_dim).

    "v1": `PatchMerging`; "v2": a 2x2 convolution of stride 2 (an odd side loses its last line); "v3": a 3x3 convolution
    of stride 2 with padding.
    """
    if version == "v1":
        return PatchMerging(dim, out_dim, norm)
    kernel, padding = (2, 0) if version == "v2" else (3, 1)
    convolution = StridedConv(dim, out_dim, kernel, stride=2, padding=padding)
    return ImageLayers(ToChannelsFirst(), convolution, ToChannelsLast(), norm(out_dim, keep_float32=True))
