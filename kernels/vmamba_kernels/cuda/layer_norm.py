"""LayerNorm on the GPU, as custom operators of PyTorch.  PyTorch's own gives a block to each row, which leaves most of
a GPU idle on rows as short as a pixel's channels: see docs/kernels-design.md."""

import struct
from functools import cache

import torch
from torch import Tensor

from .compiler import Module, load
from .layout import TYPES
from .scan import aligned

MAX_DIM = 1024  # channels that a warp's registers hold
_WARPS = 4


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return _forward(x, weight, bias, eps, out_dtype)


def macros(dim: int, x: torch.dtype, out: torch.dtype) -> tuple[tuple[str, object], ...]:
    """What layer_norm.cu is compiled with."""
    vec = next(v for v in (4, 2, 1) if dim % v == 0)
    return ("X", TYPES[x]), ("G", TYPES[out]), ("DIM", dim), ("VEC", vec), ("WARPS", _WARPS)


def _kernels(x: Tensor, out: torch.dtype) -> Module:
    return load("layer_norm.cu", macros(x.shape[-1], x.dtype, out), x.device)


@cache
def _backward_blocks(device: torch.device) -> int:
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


def _bits(eps: float) -> int:
    return struct.unpack("<i", struct.pack("<f", eps))[0]


@torch.library.custom_op("vmamba::layer_norm_cuda", mutates_args=(), device_types="cuda")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    x, weight, bias = aligned(x), aligned(weight), aligned(bias)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    if rows:
        with torch.cuda.device(x.device):
            kernel = _kernels(x, out_dtype).layer_norm_fwd_kernel
            kernel(-(-rows // _WARPS), _WARPS * 32, 0, x, weight, bias, out, rows, _bits(eps))
    return out


@_forward.register_fake
def _(x, weight, bias, eps, out_dtype):
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)


@torch.library.custom_op("vmamba::layer_norm_bwd_cuda", mutates_args=(), device_types="cuda")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dim = x.shape[-1]
    rows = x.numel() // dim
    dy, x, weight = aligned(dy), aligned(x), aligned(weight)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows:
        return dx, torch.zeros_like(weight), torch.zeros_like(weight)
    with torch.cuda.device(x.device):
        blocks = min(_backward_blocks(x.device), -(-rows // _WARPS))
        partial = torch.empty(blocks, 2, dim, dtype=torch.float32, device=x.device)
        kernel = _kernels(x, dy.dtype).layer_norm_bwd_kernel
        kernel(blocks, _WARPS * 32, 0, dy, x, weight, dx, partial, rows, _bits(eps))
        d_weight, d_bias = partial.sum(0).unbind(0)
    return dx, d_weight.clone(), d_bias.clone()


@_backward.register_fake
def _(dy, x, weight, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx, dy):
    return *_backward(dy, *ctx.saved_tensors, ctx.eps), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
