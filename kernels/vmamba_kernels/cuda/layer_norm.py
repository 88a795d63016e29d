"""LayerNorm on the GPU, as operators of PyTorch.  PyTorch's own gives a block to each row, which leaves most of
a GPU idle on rows as short as a pixel's channels: see docs/kernels-design.md."""

import struct
from functools import cache, lru_cache

import torch
from torch import Tensor

from .compiler import Module, load
from .layout import TYPES
from .operator import Operator
from .scan import aligned

MAX_DIM = 1024  # channels that a warp's registers hold
_WARPS = 4


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return FORWARD(x, weight, bias, eps, out_dtype)


def macros(dim: int, x: torch.dtype, out: torch.dtype) -> tuple[tuple[str, object], ...]:
    """What layer_norm.cu is compiled with."""
    vec = next(v for v in (4, 2, 1) if dim % v == 0)
    return ("PixelT", TYPES[x]), ("OutT", TYPES[out]), ("DIM", dim), ("CHANNELS_A_READ", vec), ("WARPS_A_BLOCK", _WARPS)


@cache
def _kernels(dim: int, x: torch.dtype, out: torch.dtype, device: torch.device) -> Module:
    return load("layer_norm.cu", macros(dim, x, out), device)


@cache
def _backward_blocks(device: torch.device) -> int:
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(64)
def _bits(eps: float) -> int:
    return struct.unpack("<i", struct.pack("<f", eps))[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    x, weight, bias = aligned(x), aligned(weight), aligned(bias)
    out, dim = torch.empty_like(x, dtype=out_dtype), x.shape[-1]
    rows = x.numel() // dim
    if rows:
        kernel = _kernels(dim, x.dtype, out_dtype, x.device).layer_norm_fwd_kernel
        kernel(-(-rows // _WARPS), _WARPS * 32, 0, x, weight, bias, out, rows, _bits(eps))
    return out


def _like_forward(x, weight, bias, eps, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight and bias as the two rows of one tensor."""
    dy, x, weight = aligned(dy), aligned(x), aligned(weight)
    dx, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    blocks = min(_backward_blocks(x.device), -(-rows // _WARPS))
    partial = weight.new_empty(blocks, 2, dim)
    if rows:
        kernel = _kernels(dim, x.dtype, dy.dtype, x.device).layer_norm_bwd_kernel
        kernel(blocks, _WARPS * 32, 0, dy, x, weight, dx, partial, rows, _bits(eps))
    return dx, partial.sum(0)


def _like_backward(dy, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(2, x.shape[-1])


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx, dy):
    dx, d_parameters = BACKWARD(dy, *ctx.saved_tensors, ctx.eps)
    return dx, *d_parameters.unbind(0), None, None


FORWARD = Operator("layer_norm_cuda", _forward, _like_forward, _setup_context, _autograd)
BACKWARD = Operator("layer_norm_bwd_cuda", _backward, _like_backward)
