"""selective_scan (1-D, Mamba's layout) on the GPU, as custom operators of PyTorch: the kernels of the 2-D operator over
an image of one row, whose routes are the groups."""

import torch
from torch import Tensor

from . import scan
from .layout import Layout, chunk_steps, layout
from .scan import Geometry


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dtype = u.dtype
    for other in (delta, B, C):
        dtype = torch.promote_types(dtype, other.dtype)
    inputs = u.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), D, delta_bias
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _forward(*inputs, delta_softplus, out_dtype, save)[0]


def _layout(u: Tensor, A: Tensor, B: Tensor, out_dtype: torch.dtype, softplus: bool) -> Layout:
    return layout(A.shape[1], 0, u.shape[1] // B.shape[1], u.dtype, out_dtype, softplus)


def _geometry(u: Tensor, B: Tensor) -> Geometry:
    batch, channels, length = u.shape
    groups = B.shape[1]
    return Geometry(batch, 1, length, groups, 0, channels, channels // groups)


def _last(t: Tensor) -> Tensor:
    """(batch, channels, length) -> (batch, length, channels), contiguous."""
    return scan.aligned(t.transpose(1, 2))


def _rows(B: Tensor, C: Tensor, plan: Layout) -> Tensor:
    """(batch, length, groups, row width)."""
    batch, groups, _, length = B.shape
    rows = B.new_zeros(batch, length, groups, plan.row_width, dtype=plan.row_dtype)
    for section, part in zip(plan.sections(rows, 3)[1:], (B, C), strict=True):
        section.copy_(part.permute(0, 3, 1, 2))
    return rows


@torch.library.custom_op("vmamba::selective_scan_cuda", mutates_args=(), device_types="cuda")
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    softplus: bool, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan, geometry = _layout(u, A, B, out_dtype, softplus), _geometry(u, B)
    if u.numel() == 0:
        return u.new_empty(u.shape, dtype=out_dtype), A.new_empty(_borders_shape(u, A, B, save))
    with torch.cuda.device(u.device):
        u, delta, A = _last(u), _last(delta), A.contiguous()
        bias = None if delta_bias is None else delta_bias.contiguous()
        skip = None if D is None else D.contiguous()
        rows = _rows(B, C, plan)
        y, borders = scan.forward(plan, geometry, u, delta, rows, None, bias, A, save)
        out = scan.merge_forward(plan, y, u, skip, 1, u.new_empty(u.shape, dtype=out_dtype))
    return out.transpose(1, 2).contiguous(), borders if save else A.new_empty(0)


def _borders_shape(u: Tensor, A: Tensor, B: Tensor, save: bool) -> tuple[int, ...]:
    if not save:
        return (0,)
    (channels, states), groups = A.shape, B.shape[1]
    chunk = chunk_steps(int(states))
    return u.shape[0], groups, (u.shape[2] + chunk - 1) // chunk - 1, states, channels // groups


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save):
    return u.new_empty(u.shape, dtype=out_dtype), A.new_empty(_borders_shape(u, A, B, save))


@torch.library.custom_op("vmamba::selective_scan_bwd_cuda", mutates_args=(), device_types="cuda")
def _backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, borders: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan, geometry = _layout(u, A, B, dy.dtype, softplus), _geometry(u, B)
    channels, states = A.shape
    if u.numel() == 0:
        return tuple(torch.zeros_like(t).contiguous() for t in (u, delta, A, B, C, A[:, 0], A[:, 0]))
    with torch.cuda.device(u.device):
        u, delta, dy, A = _last(u), _last(delta), _last(dy), A.contiguous()
        bias = None if delta_bias is None else delta_bias.contiguous()
        skip = None if D is None else D.contiguous()
        g = scan.backward(plan, geometry, u, delta, _rows(B, C, plan), None, bias, A, dy, borders)
        du = scan.merge_backward(plan, g.x, dy, skip, None, 1, torch.empty_like(u))
        dB, dC = (part.permute(0, 2, 3, 1).to(B.dtype) for part in plan.sections(g.rows, 3)[1:])
    return (
        du.transpose(1, 2).contiguous(), g.steps.flatten(2).transpose(1, 2).to(delta.dtype).contiguous(),
        g.A.view(channels, states), dB.contiguous(), dC.contiguous(),
        g.D.reshape(-1), g.dt_bias.reshape(-1),
    )  # fmt: skip


@_backward.register_fake
def _(dy, u, delta, A, B, C, D, delta_bias, borders, softplus):
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
    du, d_delta, dA, dB, dC, dD, d_bias = _backward(dy, *tensors, borders, ctx.softplus)
    *_, D, bias = tensors
    return du, d_delta, dA, dB, dC, None if D is None else dD, None if bias is None else d_bias, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
