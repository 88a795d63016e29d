"""A 3x3 convolution of each channel on the GPU, alone or with SiLU behind it, as an operator of PyTorch.

cuDNN's takes up to twice the time, and a tenth of a second for the first images of every size: see
docs/kernels-design.md.
"""

from functools import cache

import torch
from torch import Tensor

from .compiler import Module, load
from .layout import TYPES, side_by_side
from .operator import Operator
from .scan import aligned
from .sum_rows import sum_rows

SIDE = 3
_THREADS = 128  # of a block, at most


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, keep: bool) -> Tensor:
    """`keep`: whether a backward pass will follow."""
    bias = None if bias is None else bias.float()
    return FORWARD(x, weight.float(), bias, silu, silu and keep)[0]


def macros(dim: int, dtype: torch.dtype, silu: bool, backward: bool) -> tuple[tuple[str, object], ...]:
    """What depthwise_conv.cu is compiled with."""
    vec = next(v for v in ((2, 1) if backward else (4, 2, 1)) if dim % v == 0)  # backward more registers
    lanes = side_by_side(dim // vec)
    sizes = (
        ("DIM", dim),
        ("CHANNELS_A_READ", vec),
        ("LANES", lanes),
        ("STRIPS", max(1, _THREADS // lanes)),
        ("ROWS", 4 if backward else 2),
    )
    return ("PixelT", TYPES[dtype]), ("SILU", int(silu)), *sizes


class _Kernels:
    """The kernels for a number of channels, and how images are dealt out to their blocks."""

    def __init__(self, dim: int, dtype: torch.dtype, silu: bool, backward: bool, device: torch.device):
        kind = macros(dim, dtype, silu, backward)
        sizes = dict(kind)
        self.module: Module = load("depthwise_conv.cu", kind, device)
        self.threads = sizes["LANES"] * sizes["STRIPS"]
        self.tiles = -(-dim // (sizes["CHANNELS_A_READ"] * sizes["LANES"]))
        self._strips_a_block, self._rows = sizes["STRIPS"], sizes["ROWS"]

    def strips(self, x: Tensor, columns: int) -> tuple[int, int]:
        """(strips of the images, blocks that take a strip a thread)."""
        batch, height, width, _ = x.shape
        strips = batch * -(-height // self._rows) * -(-width // columns)
        return strips, -(-strips // self._strips_a_block)


_kernels = cache(_Kernels)


def _columns(x: Tensor) -> int:
    """Of a strip: long ones read fewer pixels twice, short ones give a small image more threads."""
    return 14 if x.numel() > 2**22 else 4


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """(the result, what SiLU was taken of if that is to be kept)."""
    x, weight = aligned(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out, before = torch.empty_like(x), torch.empty_like(x) if keep else x.new_empty(0)
    _, height, width, dim = x.shape
    if x.numel():
        kernels, columns = _kernels(dim, x.dtype, silu, False, x.device), _columns(x)
        strips, blocks = kernels.strips(x, columns)
        kernels.module.depthwise_conv_fwd_kernel(
            blocks * kernels.tiles, kernels.threads, 0,
            x, weight, bias, out, before if keep else None, strips, height, width, columns,
        )  # fmt: skip
    return out, before


def _backward(dy: Tensor, x: Tensor, before: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight and bias one behind the other."""
    dy, x, weight = aligned(dy), aligned(x), weight.contiguous()
    dx = torch.empty_like(x)
    _, height, width, dim = x.shape
    kernels, columns = _kernels(dim, x.dtype, before is not None, True, x.device), _columns(x)
    strips, blocks = kernels.strips(x, columns)
    kernel = kernels.module.depthwise_conv_bwd_kernel
    blocks = max(1, min(blocks, kernel.blocks_at_once(kernels.threads) // kernels.tiles))
    partial = weight.new_empty(blocks, 10 * dim)
    if x.numel():
        kernel(
            blocks * kernels.tiles, kernels.threads, 0,
            dy, x, before, weight, dx, partial, strips, height, width, columns,
        )  # fmt: skip
        return dx, sum_rows(partial)
    return dx, partial.new_zeros(10 * dim)


def _like_forward(x, weight, bias, silu, keep):
    return x.new_empty(x.shape), x.new_empty(x.shape if keep else 0)


def _like_backward(dy, x, before, weight):
    return x.new_empty(x.shape), weight.new_empty(10 * x.shape[-1])


def _setup_context(ctx, inputs, output):
    x, weight, bias, silu, keep = inputs
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)  # none for what is only kept
    ctx.save_for_backward(x, output[1] if silu else None, weight)


def _autograd(ctx, dy, _):
    if dy is None:
        return None, None, None, None, None
    x, _, weight = ctx.saved_tensors
    dx, d_parameters = BACKWARD(dy, *ctx.saved_tensors)
    d_weight, d_bias = d_parameters.split([weight.numel(), x.shape[-1]])
    d_weight = d_weight.as_strided(weight.shape, (SIDE * SIDE, 1, SIDE, 1))  # as cuDNN's and the parameter's are
    return dx, d_weight, d_bias if ctx.has_bias else None, None, None


FORWARD = Operator("depthwise_conv_cuda", _forward, _like_forward, _setup_context, _autograd)
BACKWARD = Operator("depthwise_conv_bwd_cuda", _backward, _like_backward)
