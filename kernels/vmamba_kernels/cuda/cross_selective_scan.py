"""cross_selective_scan on the GPU, as operators of PyTorch."""

from functools import lru_cache

import torch
from torch import Tensor

from ..registry import wants_gradient
from .layout import Layout, layout
from .operator import Operator
from .scan import Geometry, Scan, aligned, empty_borders

KINDS = {"row": 0, "col": 1, "row_rev": 2, "col_rev": 3}
TYPED_PRODUCT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)  # torch.mm has out_dtype


def cross_selective_scan(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    routes: tuple[str, ...], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    kinds = sum(KINDS[route] << (2 * i) for i, route in enumerate(routes))
    inputs = x, x_proj_weight, dt_weight, dt_bias, A, D
    return FORWARD(*inputs, kinds, out_dtype, wants_gradient(*inputs))[0]


@lru_cache(4096)
def _scan(
    image: torch.Size, routes: int, kinds: int, states: int, rank: int, x: torch.dtype, out: torch.dtype,
    device: torch.device,
) -> Scan:  # fmt: skip
    batch, height, width, dim = image
    return Scan(layout(states, rank, dim, x, out), Geometry(batch, height, width, routes, kinds, dim, 0), device)


def _project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., dim) by weight (columns, dim) to (pixels, columns) in dtype, never rounded to float16."""
    x = x.view(-1, x.shape[-1])
    if x.dtype == dtype:
        return torch.mm(x, weight.t())
    if TYPED_PRODUCT:
        return torch.mm(x, weight.t(), out_dtype=dtype)
    return x.to(dtype) @ weight.to(dtype).t()


def _forward(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    kinds: int, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and for the backward pass: the states at chunk borders, the packed weight, the sum of D."""
    if x.numel() == 0:
        return _like_forward(x, x_proj_weight, dt_weight, dt_bias, A, D, kinds, out_dtype, save)
    (routes, _, states), rank = A.shape, dt_weight.shape[2]
    scan = _scan(x.shape, routes, kinds, states, rank, x.dtype, out_dtype, x.device)
    x, dt_weight, A = aligned(x), dt_weight.contiguous(), A.contiguous()
    bias = None if dt_bias is None else dt_bias.contiguous()
    packed, skip = scan.pack(x_proj_weight.contiguous(), None if D is None else D.contiguous())
    rows = _project(x, packed, scan.layout.row_dtype)
    y, borders = scan.forward(x, None, rows, dt_weight, bias, A, save)
    return scan.merge_forward(y, x, skip), borders, packed, skip


def _like_forward(x, x_proj_weight, dt_weight, dt_bias, A, D, kinds, out_dtype, save):
    routes, dim, states = A.shape
    plan = layout(int(states), int(dt_weight.shape[2]), int(dim), x.dtype, out_dtype)
    borders = empty_borders(x, plan, x.shape[0], routes, x.shape[1] * x.shape[2], save)
    return (
        x.new_empty(x.shape, dtype=out_dtype), borders,
        x_proj_weight.new_empty(routes * plan.row_width, dim), A.new_empty(0 if D is None else dim),
    )  # fmt: skip


def _backward(
    dy: Tensor, x: Tensor, packed: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, skip: Tensor,
    borders: Tensor, kinds: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        return tuple(t.zero_() for t in _like_backward(dy, x, packed, dt_weight, dt_bias, A, skip, borders, kinds))
    (routes, dim, states), rank = A.shape, dt_weight.shape[2]
    scan = _scan(x.shape, routes, kinds, states, rank, x.dtype, dy.dtype, x.device)
    dtype, width, pixels = scan.layout.row_dtype, scan.layout.row_width, scan.geometry.pixels
    x, dy, dt_weight, A = aligned(x), aligned(dy), dt_weight.contiguous(), A.contiguous()
    bias = None if dt_bias is None else dt_bias.contiguous()
    rows = _project(x, packed, dtype)
    g = scan.backward(x, None, rows, dt_weight, bias, A, dy, borders)

    d_dt_weight = g.dt_weight
    if d_dt_weight is None:
        d_steps = g.steps.transpose(0, 1)
        g.rows.view(pixels, routes, width)[:, :, :rank] = torch.bmm(d_steps, dt_weight.to(dtype)).transpose(0, 1)
        step_rows = rows.view(pixels, routes, width)[:, :, :rank].transpose(0, 1)
        d_dt_weight = torch.bmm(d_steps.transpose(1, 2), step_rows).to(dt_weight.dtype)
    d_weight = torch.mm(g.rows.t(), x.view(pixels, dim).to(dtype)).to(packed.dtype).view(routes, width, dim)
    through_rows = torch.mm(g.rows, packed.to(dtype))  # (pixels, dim)
    dx = scan.merge_backward(g.x, dy, skip, through_rows)
    return dx, _unpacked(scan.layout, d_weight), d_dt_weight, g.dt_bias, g.A, g.D


def _unpacked(layout: Layout, packed: Tensor) -> Tensor:
    """(routes, row width, dim) -> (routes, rank + 2*states, dim), without the zeros between and behind."""
    if layout.b_column + layout.padded_states == layout.rank + layout.states:  # none between
        return packed.narrow(1, 0, layout.rank + 2 * layout.states).contiguous()
    return torch.cat(layout.sections(packed, 1), 1)


def _like_backward(dy, x, packed, dt_weight, dt_bias, A, skip, borders, kinds):
    routes, dim, states = A.shape
    return (
        x.new_empty(x.shape), packed.new_empty(routes, dt_weight.shape[2] + 2 * states, dim),
        dt_weight.new_empty(dt_weight.shape), A.new_empty(routes, dim), A.new_empty(A.shape), A.new_empty(routes, dim),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, _, dt_weight, dt_bias, A, D, ctx.kinds, _, _ = inputs
    _, borders, packed, skip = output
    ctx.save_for_backward(x, packed, dt_weight, dt_bias, A, skip, borders)
    ctx.has_skip = D is not None
    ctx.mark_non_differentiable(borders, packed, skip)
    ctx.set_materialize_grads(False)  # no zeros for them


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    dx, d_weight, d_dt_weight, d_bias, dA, dD = BACKWARD(dy, *saved, ctx.kinds)
    d_bias, dD = None if saved[3] is None else d_bias, dD if ctx.has_skip else None
    return dx, d_weight, d_dt_weight, d_bias, dA, dD, None, None, None


FORWARD = Operator("cross_selective_scan_cuda", _forward, _like_forward, _setup_context, _autograd)
BACKWARD = Operator("cross_selective_scan_bwd_cuda", _backward, _like_backward)
