"""cross_selective_scan on the GPU, as custom operators of PyTorch."""

import torch
from torch import Tensor

from . import scan
from .layout import Layout, chunk_steps, layout
from .scan import Geometry, aligned

KINDS = {"row": 0, "col": 1, "row_rev": 2, "col_rev": 3}
TYPED_PRODUCT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)  # torch.mm has out_dtype


def cross_selective_scan(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    routes: tuple[str, ...], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    kinds = sum(KINDS[route] << (2 * i) for i, route in enumerate(routes))
    inputs = x, x_proj_weight, dt_weight, dt_bias, A, D
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _forward(*inputs, kinds, out_dtype, save)[0]


def _geometry(x: Tensor, routes: int, kinds: int) -> Geometry:
    batch, height, width, dim = x.shape
    return Geometry(batch, height, width, routes, kinds, dim, 0)


def _layout(x: Tensor, dt_weight: Tensor, A: Tensor, out_dtype: torch.dtype) -> Layout:
    return layout(A.shape[2], dt_weight.shape[2], x.shape[3], x.dtype, out_dtype)


def _project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., dim) by weight (columns, dim) to (pixels, columns) in dtype, never rounded to float16."""
    x = x.view(-1, x.shape[-1])
    if x.dtype == dtype:
        return x @ weight.t()
    if TYPED_PRODUCT:
        return torch.mm(x, weight.t(), out_dtype=dtype)
    return x.to(dtype) @ weight.to(dtype).t()


@torch.library.custom_op("vmamba::cross_selective_scan_cuda", mutates_args=(), device_types="cuda")
def _forward(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    kinds: int, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan, geometry = _layout(x, dt_weight, A, out_dtype), _geometry(x, A.shape[0], kinds)
    out = x.new_empty(x.shape, dtype=out_dtype)
    if out.numel() == 0:
        return out, A.new_empty(_borders_shape(x, A, save))
    with torch.cuda.device(x.device):
        x, dt_weight, A = aligned(x), dt_weight.contiguous(), A.contiguous()
        weight, skip = scan.pack(plan, x_proj_weight.contiguous(), None if D is None else D.contiguous())
        rows = _project(x, weight, plan.row_dtype)
        bias = None if dt_bias is None else dt_bias.contiguous()
        y, borders = scan.forward(plan, geometry, x, None, rows, dt_weight, bias, A, save)
        scan.merge_forward(plan, y, x, skip, geometry.routes, out)
    return out, borders if save else A.new_empty(0)


def _borders_shape(x: Tensor, A: Tensor, save: bool) -> tuple[int, ...]:
    if not save:
        return (0,)
    routes, dim, states = A.shape
    chunk = chunk_steps(int(states))
    return x.shape[0], routes, (x.shape[1] * x.shape[2] + chunk - 1) // chunk - 1, states, dim


@_forward.register_fake
def _(x, x_proj_weight, dt_weight, dt_bias, A, D, kinds, out_dtype, save):
    return x.new_empty(x.shape, dtype=out_dtype), A.new_empty(_borders_shape(x, A, save))


@torch.library.custom_op("vmamba::cross_selective_scan_bwd_cuda", mutates_args=(), device_types="cuda")
def _backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor,
    D: Tensor | None, borders: Tensor, kinds: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    routes, dim, states = A.shape
    rank, pixels = dt_weight.shape[2], x.numel() // dim if dim else 0
    plan, geometry = _layout(x, dt_weight, A, dy.dtype), _geometry(x, routes, kinds)
    if x.numel() == 0:
        zeros = [torch.zeros_like(t) for t in (x, x_proj_weight, dt_weight, A[:, :, 0], A, A[:, :, 0])]
        return tuple(t.contiguous() for t in zeros)
    with torch.cuda.device(x.device):
        dtype, width = plan.row_dtype, plan.row_width
        x, dy, dt_weight, A = aligned(x), aligned(dy), dt_weight.contiguous(), A.contiguous()
        bias = None if dt_bias is None else dt_bias.contiguous()
        weight, skip = scan.pack(plan, x_proj_weight.contiguous(), None if D is None else D.contiguous())
        rows = _project(x, weight, dtype)
        g = scan.backward(plan, geometry, x, None, rows, dt_weight, bias, A, dy, borders)

        d_rows, d_dt_weight = g.rows.view(pixels, routes, width), g.dt_weight
        if d_dt_weight is None:
            d_steps = g.steps.view(pixels, routes, dim).transpose(0, 1)
            d_rows[:, :, :rank] = torch.bmm(d_steps, dt_weight.to(dtype)).transpose(0, 1)
            step_rows = rows.view(pixels, routes, width)[:, :, :rank].transpose(0, 1)
            d_dt_weight = torch.bmm(d_steps.transpose(1, 2), step_rows).to(dt_weight.dtype)
        d_rows = d_rows.view(pixels, routes * width)
        d_weight = (d_rows.t() @ x.view(pixels, dim).to(dtype)).to(x_proj_weight.dtype).view(routes, width, dim)
        through_rows = d_rows @ weight.to(dtype)  # (pixels, dim)
        dx = scan.merge_backward(plan, g.x, dy, skip, through_rows, routes, torch.empty_like(x))
    return dx, torch.cat(plan.sections(d_weight, 1), 1), d_dt_weight, g.dt_bias, g.A, g.D


@_backward.register_fake
def _(dy, x, x_proj_weight, dt_weight, dt_bias, A, D, borders, kinds):
    like = [x, x_proj_weight, dt_weight, A[:, :, 0], A, A[:, :, 0]]
    return tuple(t.new_empty(t.shape) for t in like)


def _setup_context(ctx, inputs, output):
    *tensors, kinds, _, save = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.kinds = kinds
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the borders


def _autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    *tensors, borders = ctx.saved_tensors
    dx, d_weight, d_dt_weight, d_bias, dA, dD = _backward(dy, *tensors, borders, ctx.kinds)
    _, _, _, bias, _, D = tensors
    return dx, d_weight, d_dt_weight, None if bias is None else d_bias, dA, None if D is None else dD, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
