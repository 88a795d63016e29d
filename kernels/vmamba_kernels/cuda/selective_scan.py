"""selective_scan (1-D, Mamba's layout) on the GPU, as operators of PyTorch: the kernels of the 2-D operator over
an image of one row, whose routes are the groups."""

from functools import lru_cache

import torch
from torch import Tensor

from ..registry import wants_gradient
from .layout import Layout, layout
from .operator import Operator
from .scan import Geometry, Scan, aligned, empty_borders


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dtype = u.dtype
    for other in (delta, B, C):
        dtype = torch.promote_types(dtype, other.dtype)
    inputs = u.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), D, delta_bias
    return FORWARD(*inputs, delta_softplus, out_dtype, wants_gradient(*inputs))[0]


@lru_cache(4096)
def _scan(
    u_shape: torch.Size, groups: int, states: int, u: torch.dtype, out: torch.dtype, softplus: bool,
    device: torch.device,
) -> Scan:  # fmt: skip
    batch, channels, length = u_shape
    dim = channels // groups
    geometry = Geometry(batch, 1, length, groups, 0, channels, dim)
    return Scan(layout(states, 0, dim, u, out, softplus), geometry, device)


def _last(t: Tensor) -> Tensor:
    """(batch, channels, length) -> (batch, length, channels), contiguous."""
    return aligned(t.transpose(1, 2))


def _rows(B: Tensor, C: Tensor, layout: Layout) -> Tensor:
    """(batch, length, groups, row width)."""
    batch, groups, _, length = B.shape
    rows = B.new_zeros(batch, length, groups, layout.row_width, dtype=layout.row_dtype)
    for section, part in zip(layout.sections(rows, 3)[1:], (B, C), strict=True):
        section.copy_(part.permute(0, 3, 1, 2))
    return rows


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    softplus: bool, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and for the backward pass the states at chunk borders."""
    if u.numel() == 0:
        return _like_forward(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save)
    scan = _scan(u.shape, B.shape[1], A.shape[1], u.dtype, out_dtype, softplus, u.device)
    u, delta, A = _last(u), _last(delta), A.contiguous()
    bias = None if delta_bias is None else delta_bias.contiguous()
    skip = None if D is None else D.contiguous()
    out = torch.empty_like(u, dtype=out_dtype)
    borders = scan.forward(u, delta, _rows(B, C, scan.layout), None, bias, A, skip, out, save)
    return out.transpose(1, 2).contiguous(), borders


def _like_forward(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save):
    (channels, states), groups = A.shape, B.shape[1]
    plan = layout(int(states), 0, int(channels // groups), u.dtype, out_dtype, softplus)
    return u.new_empty(u.shape, dtype=out_dtype), empty_borders(u, plan, u.shape[0], groups, u.shape[2], save)


def _backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, borders: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if u.numel() == 0:
        return tuple(t.zero_() for t in _like_backward(dy, u, delta, A, B, C, D, delta_bias, borders, softplus))
    (batch, groups, states, length), channels = B.shape, A.shape[0]
    scan = _scan(u.shape, groups, states, u.dtype, dy.dtype, softplus, u.device)
    u, delta, dy, A = _last(u), _last(delta), _last(dy), A.contiguous()
    bias = None if delta_bias is None else delta_bias.contiguous()
    skip = None if D is None else D.contiguous()
    g = scan.backward(u, delta, _rows(B, C, scan.layout), None, bias, A, dy, borders)
    du = scan.merge_backward(g.x, dy, skip, None, torch.empty_like(u))
    rows = g.rows.view(batch, length, groups, -1)
    dB, dC = (part.permute(0, 2, 3, 1).to(B.dtype) for part in scan.layout.sections(rows, 3)[1:])
    d_delta = g.steps.view(batch, length, channels).transpose(1, 2).to(delta.dtype)
    return (
        du.transpose(1, 2).contiguous(), d_delta.contiguous(), g.A.view(channels, states), dB.contiguous(),
        dC.contiguous(), g.D.reshape(-1), g.dt_bias.reshape(-1),
    )  # fmt: skip


def _like_backward(dy, u, delta, A, B, C, D, delta_bias, borders, softplus):
    return tuple(t.new_empty(t.shape) for t in (u, delta, A, B, C, A[:, 0], A[:, 0]))


def _setup_context(ctx, inputs, output):
    *tensors, softplus, _, save = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.softplus = softplus
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the borders


def _autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 10
    *tensors, borders = ctx.saved_tensors
    du, d_delta, dA, dB, dC, dD, d_bias = BACKWARD(dy, *tensors, borders, ctx.softplus)
    *_, D, bias = tensors
    return du, d_delta, dA, dB, dC, None if D is None else dD, None if bias is None else d_bias, None, None, None


FORWARD = Operator("selective_scan_cuda", _forward, _like_forward, _setup_context, _autograd)
BACKWARD = Operator("selective_scan_bwd_cuda", _backward, _like_backward)
