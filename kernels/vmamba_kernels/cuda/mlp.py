"""An MLP with GELU on the GPU, as an operator of PyTorch: the matrix products are PyTorch's, what lies between is ours.

It keeps what goes into GELU and makes what comes out of it again, where PyTorch keeps both: see docs/kernels-design.md.
"""

from functools import cache

import torch
from torch import Tensor

from .compiler import Kernel, Module, load
from .layout import TYPES, side_by_side
from .operator import Operator
from .scan import aligned
from .sum_rows import sum_rows

_THREADS = 256  # of a block, at most


def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool) -> Tensor:
    """`keep`: whether a backward pass will follow."""
    return FORWARD(x, weight1, bias1, weight2, bias2, keep)[0]


def macros(dim: int, dtype: torch.dtype) -> tuple[tuple[str, object], ...]:
    """What mlp.cu is compiled with, for matrices of `dim` columns."""
    vec = next(v for v in (16 // dtype.itemsize, 4, 2, 1) if dim % v == 0)
    lanes = side_by_side(dim // vec)
    sizes = ("DIM", dim), ("CHANNELS_A_READ", vec), ("LANES", lanes), ("STRIPS", max(1, _THREADS // lanes))
    return ("PixelT", TYPES[dtype]), *sizes


class _Kernels:
    """The kernels for matrices of `dim` columns."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device):
        kind = macros(dim, dtype)
        sizes = dict(kind)
        self.module: Module = load("mlp.cu", kind, device)
        self.dim, self.vec, self.strips = dim, sizes["CHANNELS_A_READ"], sizes["STRIPS"]
        self.threads = sizes["LANES"] * self.strips
        self.tiles = -(-dim // (self.vec * sizes["LANES"]))

    def sums(self, kernel: Kernel, rows: int, *tensors: Tensor) -> Tensor:
        """(dim,) float32, the sums over the rows that `kernel` makes beside what else it does with the tensors."""
        blocks = max(1, min(-(-rows // self.strips), kernel.blocks_at_once(self.threads) // self.tiles))
        partial = tensors[0].new_empty(blocks, self.dim, dtype=torch.float32)
        kernel(blocks * self.tiles, self.threads, 0, *tensors, partial, rows, blocks)
        return sum_rows(partial)


_kernels = cache(_Kernels)


def _matrix(x: Tensor) -> Tensor:
    return aligned(x.reshape(-1, x.shape[-1]))


def _gelu(h: Tensor, out: Tensor) -> Tensor:
    if h.numel():
        kernels = _kernels(h.shape[1], h.dtype, h.device)
        count = h.numel() // kernels.vec
        kernels.module.gelu_fwd_kernel(min(-(-count // 256), 1 << 20), 256, 0, h, out, count)
    return out


def _gelu_backward(d_out: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(what GELU gives of h, the sums over the rows of the gradient of h); that gradient takes the place of d_out."""
    kernels, out = _kernels(h.shape[1], h.dtype, h.device), torch.empty_like(h)
    return out, kernels.sums(kernels.module.gelu_bwd_kernel, len(h), d_out, h, out)


def _sum_columns(x: Tensor) -> Tensor:
    kernels = _kernels(x.shape[1], x.dtype, x.device)
    return kernels.sums(kernels.module.sum_columns_kernel, len(x), x)


def _forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(the result, what GELU was taken of if that is to be kept)."""
    h = torch.addmm(bias1, _matrix(x), weight1.t())
    out = torch.addmm(bias2, _gelu(h, torch.empty_like(h) if keep else h), weight2.t())
    return out.view(*x.shape[:-1], out.shape[1]), h if keep else h.new_empty(0)


def _backward(
    dy: Tensor, x: Tensor, h: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight1, bias1, weight2 and bias2, those of the biases in float32."""
    if not x.numel():
        return tuple(each.zero_() for each in _like_backward(dy, x, h, weight1, weight2))
    shape, x, dy = x.shape, _matrix(x), _matrix(dy)
    d_h = dy @ weight2  # of GELU's result, until the kernel
    activated, d_bias1 = _gelu_backward(d_h, h)
    d_weight2 = dy.t() @ activated
    del activated
    return (d_h @ weight1).view(shape), d_h.t() @ x, d_bias1, d_weight2, _sum_columns(dy)


def _like_forward(x, weight1, bias1, weight2, bias2, keep):
    rows = x.numel() // x.shape[-1]
    h = x.new_empty(rows, len(weight1)) if keep else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], len(weight2)), h


def _like_backward(dy, x, h, weight1, weight2):
    biases = [weight.new_empty(len(weight), dtype=torch.float32) for weight in (weight1, weight2)]
    return (
        x.new_empty(x.shape), weight1.new_empty(weight1.shape), biases[0], weight2.new_empty(weight2.shape), biases[1],
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weight1, bias1, weight2, _, _ = inputs
    ctx.bias = bias1.dtype
    ctx.set_materialize_grads(False)  # none for what is only kept
    ctx.save_for_backward(x, output[1], weight1, weight2)


def _autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 6
    dx, d_weight1, d_bias1, d_weight2, d_bias2 = BACKWARD(dy, *ctx.saved_tensors)
    return dx, d_weight1, d_bias1.to(ctx.bias), d_weight2, d_bias2.to(ctx.bias), None


FORWARD = Operator("gelu_mlp_cuda", _forward, _like_forward, _setup_context, _autograd)
BACKWARD = Operator("gelu_mlp_bwd_cuda", _backward, _like_backward)
