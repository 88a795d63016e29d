"""LayerNorm on the GPU, alone and behind an addition, as operators of PyTorch.

PyTorch's own gives a block to each row, which leaves most of a GPU idle on rows as short as a pixel's channels: see
docs/kernels-design.md.
"""

import struct
from functools import cache, lru_cache

import torch
from torch import Tensor

from .compiler import Module, load
from .layout import TYPES
from .operator import Operator
from .scan import aligned
from .sum_rows import sum_rows

MAX_DIM = 1024  # channels that a warp's registers hold
_WARPS = 4


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return FORWARD(x, weight, bias, eps, out_dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return ADD_FORWARD(x, branch, factor, weight, bias, eps, out_dtype)


def macros(
    dim: int, x: torch.dtype, out: torch.dtype, branch: torch.dtype | None = None
) -> tuple[tuple[str, object], ...]:
    """What layer_norm.cu is compiled with; `branch`: of the image that is added, if one is."""
    vec = next(v for v in (4, 2, 1) if dim % v == 0)
    types = ("PixelT", TYPES[x]), ("OutT", TYPES[out]), ("BranchT", TYPES[branch or x])
    sizes = ("DIM", dim), ("CHANNELS_A_READ", vec), ("LANES", _lanes(dim)), ("WARPS_A_BLOCK", _WARPS)
    return *types, ("ADDS", int(branch is not None)), *sizes


def _lanes(dim: int) -> int:
    """Lanes that share a row, twelve channels each: then rows of 96, 192 and 384 leave none idle."""
    return next((lanes for lanes in (1, 2, 4, 8, 16) if dim <= 12 * lanes), 32)


@cache
def _kernels(
    dim: int, x: torch.dtype, out: torch.dtype, branch: torch.dtype | None, device: torch.device
) -> tuple[Module, int]:
    """The kernels, and how many rows a block of them takes at a time."""
    return load("layer_norm.cu", macros(dim, x, out, branch), device), _WARPS * 32 // _lanes(dim)


@lru_cache(64)
def _bits(eps: float) -> int:
    return struct.unpack("<i", struct.pack("<f", eps))[0]


def _norm(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """(the sum where there is a branch, the norm)."""
    adds = branch is not None
    x, weight, bias = aligned(x), aligned(weight), aligned(bias)
    branch, factor = aligned(branch) if adds else None, None if factor is None else factor.contiguous()
    total, out = torch.empty_like(x) if adds else None, torch.empty_like(x, dtype=out_dtype)
    dim = x.shape[-1]
    rows = x.numel() // dim
    if rows:
        module, rows_a_block = _kernels(dim, x.dtype, out_dtype, branch.dtype if adds else None, x.device)
        module.layer_norm_fwd_kernel(
            -(-rows // rows_a_block), _WARPS * 32, 0,
            x, branch, factor, weight, bias, total, out, rows, rows // x.shape[0], _bits(eps),
        )  # fmt: skip
    return total, out


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    d_sum: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
    branch: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of x and of the branch, and those of weight and bias as the two rows of one tensor."""
    dy, x, weight = aligned(dy), aligned(x), aligned(weight)
    d_sum, factor = None if d_sum is None else aligned(d_sum), None if factor is None else factor.contiguous()
    dx, d_branch = torch.empty_like(x), None if branch is None else torch.empty_like(x, dtype=branch)
    dim = x.shape[-1]
    rows = x.numel() // dim
    module, rows_a_block = _kernels(dim, x.dtype, dy.dtype, branch, x.device)
    kernel = module.layer_norm_bwd_kernel
    blocks = min(kernel.blocks_at_once(_WARPS * 32), -(-rows // rows_a_block))
    partial = weight.new_empty(blocks, 2, dim)
    if rows:
        kernel(
            blocks, _WARPS * 32, 0,
            dy, x, d_sum, factor, weight, dx, d_branch, partial, rows, rows // x.shape[0], _bits(eps),
        )  # fmt: skip
    return dx, d_branch, sum_rows(partial)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return _norm(x, None, None, weight, bias, eps, out_dtype)[1]


def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx, _, d_parameters = _norm_backward(dy, x, None, None, weight, eps, None)
    return dx, d_parameters


def _like_forward(x, weight, bias, eps, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype)


def _like_backward(dy, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(2, x.shape[-1])


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx, dy):
    dx, d_parameters = BACKWARD(dy, *ctx.saved_tensors, ctx.eps)
    return dx, *d_parameters.unbind(0), None, None


def _add_forward(
    x: Tensor,
    branch: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _norm(x, branch, factor, weight, bias, eps, out_dtype)


def _add_backward(
    dy: Tensor, total: Tensor, d_sum: Tensor, factor: Tensor | None, weight: Tensor, eps: float, branch: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_backward(dy, total, d_sum, factor, weight, eps, branch)


def _like_add_forward(x, branch, factor, weight, bias, eps, out_dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)


def _like_add_backward(dy, total, d_sum, factor, weight, eps, branch):
    shape = total.shape
    return total.new_empty(shape), total.new_empty(shape, dtype=branch), weight.new_empty(2, shape[-1])


def _add_setup_context(ctx, inputs, output):
    _, branch, factor, weight, _, ctx.eps, _ = inputs
    ctx.branch = branch.dtype
    ctx.save_for_backward(output[0], factor, weight)


def _add_autograd(ctx, d_sum, dy):
    total, factor, weight = ctx.saved_tensors
    dx, d_branch, d_parameters = ADD_BACKWARD(dy, total, d_sum, factor, weight, ctx.eps, ctx.branch)
    return dx, d_branch, None, *d_parameters.unbind(0), None, None


FORWARD = Operator("layer_norm_cuda", _forward, _like_forward, _setup_context, _autograd)
BACKWARD = Operator("layer_norm_bwd_cuda", _backward, _like_backward)
ADD_FORWARD = Operator("add_layer_norm_cuda", _add_forward, _like_add_forward, _add_setup_context, _add_autograd)
ADD_BACKWARD = Operator("add_layer_norm_bwd_cuda", _add_backward, _like_add_backward)
