"""`cross_selective_scan` and `selective_scan` on the kernels of scan_kernels.py, as custom operators of PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..registry import wants_gradient
from .common import (
    LOG2E,
    check_size,
    chunk_pass,
    encode_routes,
    gradients_like,
    on_device,
    passes_32_bits,
    present,
    project,
    project_backward,
    projection_dtype,
    route_dtype,
    row_length,
    stand_in,
)
from .scan_kernels import scan_adjoint_kernel, scan_bwd_kernel, scan_fwd_kernel

CHUNK = 96  # positions between saved states, and of a program where the route is split; a multiple of every tile
WARPS_WANTED = 1024  # with fewer the route is split


def cross_selective_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    routes: tuple[str, ...],
    out_dtype: torch.dtype,
) -> Tensor:
    """`vmamba_kernels.cross_selective_scan`, already checked."""
    inputs = (x, x_proj_weight, dt_weight, dt_bias, A, D)
    return _cross(*inputs, encode_routes(routes), out_dtype, wants_gradient(*inputs))[0]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`vmamba_kernels.selective_scan`, already checked."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    return _scan(*inputs, delta_softplus, out_dtype, wants_gradient(*inputs))[0]


@dataclass(frozen=True)
class Plan:
    """How one scan is launched: sizes, strides and compile-time parameters, shared by its kernels."""

    batch: int
    routes: int
    codes: int
    height: int
    width: int
    dim: int
    N: int
    rank: int
    u_strides: tuple[int, int, int, int]  # batch, route, pixel, channel
    out_strides: tuple[int, int]  # batch, route; pixel and channel are u's
    B_strides: tuple[int, int, int, int]  # batch, route, pixel, state; C has the same
    has_bias: bool
    has_skip: bool
    softplus: bool = True

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def block(self) -> int:
        """Channels of a program: the largest power of two in `dim`, but whole warps and at most four of them."""
        return min(max(self.dim & -self.dim, 32), 128)

    @property
    def programs(self) -> int:
        return self.batch * self.routes * triton.cdiv(self.dim, self.block)

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.length, CHUNK)

    @property
    def split(self) -> bool:
        """Whether each chunk of a route has its own program."""
        return self.chunks > 1 and self.programs * self.block // 32 < WARPS_WANTED

    @property
    def segments(self) -> int:
        return self.chunks if self.split else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.routes, self.codes, self.segments, CHUNK, self.length, self.height, self.width, self.dim

    @property
    def wide(self) -> bool:
        """Whether an offset inside an image, of any tensor, may need more than 32 bits."""
        return passes_32_bits(
            self.length * self.u_strides[2], self.dim * self.u_strides[3],
            self.length * self.B_strides[2], self.N * self.B_strides[3],
            self.length * 2 * self.routes * self.N,  # the gradients of B and C
            max(self.N, self.rank) * self.dim,  # a route's A, states and dt_weight
        )  # fmt: skip

    def constants(self, steps_times_states: int) -> dict:
        """Compile-time parameters; a tile holds about `steps_times_states` numbers a thread."""
        padded = triton.next_power_of_2(self.N)
        return {
            "N": self.N,
            "NP": padded,
            "RANK": self.rank,
            "C_AT": self.N if self.rank else 0,
            "DT_AT": 2 * self.N if self.rank else 0,
            "STEPS": max(1, min(16, steps_times_states // padded)),
            "BLOCK": self.block,
            "HAS_BIAS": self.has_bias,
            "SOFTPLUS": self.softplus,
            "WIDE": self.wide,
            "num_warps": self.block // 32,
        }

    def floats(self, u: Tensor, *shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    def states(self, u: Tensor) -> Tensor:
        return self.floats(u, self.batch, self.routes, self.chunks, self.N, self.dim)

    def sums(self, u: Tensor) -> Tensor:
        return self.floats(u, self.batch, self.routes, self.chunks, self.dim)


def _forward(plan: Plan, u, dt, B, C, w, bias, A2, skip, y: Tensor, save: bool) -> Tensor:
    """Write y, one image a route, and return the states entering each chunk (empty unless `save`)."""
    nothing = plan.floats(u, 0)
    states = plan.states(u) if save or plan.split else nothing
    sums = plan.sums(u) if plan.split else nothing

    def launch(mode: str) -> None:
        scan_fwd_kernel[(plan.programs * plan.segments,)](
            u, dt, B, C, w, bias, A2, skip, y, states, sums, *plan.sizes,
            *plan.u_strides, *plan.out_strides, *plan.B_strides,
            HAS_SKIP=plan.has_skip, MODE=mode, **plan.constants(64),
        )  # fmt: skip

    with on_device(u):
        if plan.split:
            launch("local")
            chunk_pass(states, sums, A2)
            launch("chunk")
        else:
            launch("save" if save else "whole")
    return states if save else nothing


def _backward(plan: Plan, u, dt, B, C, w, bias, A2, skip, dy, dy_strides, states, du, ddt) -> tuple[Tensor, ...]:
    """Write du and ddt, one image a route.

    Returns dB and dC as one tensor (batch, pixels, routes, 2*N), dA (routes, dim, N), dbias and dskip (routes, dim).
    """
    constants = plan.constants(32)
    N, routes, pieces = plan.N, plan.routes, plan.batch * plan.segments
    dBC = plan.floats(u, triton.cdiv(plan.dim, plan.block), plan.batch, plan.length, routes, 2 * N)
    dA = plan.floats(u, pieces, routes, N, plan.dim)
    dbias = plan.floats(u, pieces, routes, plan.dim)
    dskip = torch.empty_like(dbias) if plan.has_skip else dbias
    tiles = triton.cdiv(CHUNK, constants["STEPS"])
    grid = (plan.programs * plan.segments,)
    scratch = plan.floats(u, *grid, tiles, constants["NP"], plan.block)
    with on_device(u):
        adjoints = plan.states(u) if plan.split else scratch
        if plan.split:
            sums = plan.sums(u)
            scan_adjoint_kernel[grid](
                dy, dt, C, w, bias, A2, adjoints, sums, *plan.sizes,
                *plan.u_strides, *dy_strides, *plan.B_strides, **constants,
            )  # fmt: skip
            chunk_pass(adjoints, sums, A2, reverse=True)
        scan_bwd_kernel[grid](
            u, dt, B, C, w, bias, A2, skip, dy, states, adjoints, scratch,
            du, ddt, dBC, dBC[..., N:], dA, dbias, dskip, *plan.sizes,
            *plan.u_strides, *dy_strides, *plan.out_strides, *plan.B_strides,
            *(dBC.stride(i) for i in (0, 1, 3, 2)), HAS_SKIP=plan.has_skip, SPLIT=plan.split, **constants,
        )  # fmt: skip
    return dBC.sum(0), dA.sum(0).transpose(1, 2).contiguous(), dbias.sum(0), dskip.sum(0)


def _scaled(A: Tensor) -> Tensor:
    """(routes, dim, states) -> (routes, states, dim), for exp2."""
    return (A * LOG2E).transpose(1, 2).contiguous()


# The image operator.


def _image(x, x_proj_weight, dt_weight, dt_bias, A, D, codes: int) -> tuple[Plan, tuple[Tensor, ...]]:
    """How a cross_selective_scan is launched, and the tensors that its kernels read."""
    batch, height, width, dim = x.shape
    routes, _, N = A.shape
    rank = dt_weight.shape[2]
    x = x.contiguous()
    projected = project(x, x_proj_weight, rank)
    check_size(height, width)
    length = height * width
    strides = (projected.stride(0), projected.stride(2), projected.stride(1), 1)
    plan = Plan(
        batch, routes, codes, height, width, dim, N, rank,
        u_strides=(length * dim, 0, dim, 1), out_strides=(length * dim, batch * length * dim),
        B_strides=strides, has_bias=dt_bias is not None, has_skip=D is not None,
    )  # fmt: skip
    inputs = (
        x, projected, projected, projected,
        dt_weight.transpose(1, 2).contiguous(), stand_in(dt_bias, A), _scaled(A), stand_in(D, A),
    )  # fmt: skip
    return plan, inputs


@torch.library.custom_op("vmamba::cross_selective_scan_triton", mutates_args=())
def _cross(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    codes: int, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        return x.new_zeros(x.shape, dtype=out_dtype), _states_like(x, A, save)
    plan, inputs = _image(x, x_proj_weight, dt_weight, dt_bias, A, D, codes)
    y = x.new_empty(plan.routes, *x.shape, dtype=route_dtype(out_dtype))
    states = _forward(plan, *inputs, y, save)
    return y.sum(0, dtype=out_dtype), states


def _states_like(x: Tensor, A: Tensor, save: bool) -> Tensor:
    if not save:
        return x.new_empty(0, dtype=torch.float32)
    chunks = (x.shape[1] * x.shape[2] + CHUNK - 1) // CHUNK
    return x.new_empty(x.shape[0], A.shape[0], chunks, A.shape[2], A.shape[1], dtype=torch.float32)


@_cross.register_fake
def _(x, x_proj_weight, dt_weight, dt_bias, A, D, codes, out_dtype, save):
    return x.new_empty(x.shape, dtype=out_dtype), _states_like(x, A, save)


@torch.library.custom_op("vmamba::cross_selective_scan_triton_backward", mutates_args=())
def _cross_backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor,
    D: Tensor | None, states: Tensor, codes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        return tuple(torch.zeros_like(t) for t in gradients_like(x, x_proj_weight, dt_weight, dt_bias, A, D))
    plan, inputs = _image(x, x_proj_weight, dt_weight, dt_bias, A, D, codes)
    N, rank, dtype = plan.N, plan.rank, projection_dtype(x)
    du = x.new_empty(plan.routes, plan.batch, plan.length, plan.dim, dtype=dtype)
    ddt = torch.empty_like(du)
    dy_strides = (plan.length * plan.dim, 0)
    dBC, dA, dbias, dD = _backward(plan, *inputs, dy.contiguous(), dy_strides, states, du, ddt)
    with torch.autocast(x.device.type, enabled=False):
        # The steps are ranks @ dt_weight^T: two products for each route.
        ranks = inputs[1][..., 2 * N : 2 * N + rank].permute(2, 0, 1, 3)  # (routes, batch, pixels, rank)
        ddt_weight = (ddt.transpose(2, 3) @ ranks).sum(1, dtype=torch.float32)  # (routes, dim, rank)
        dranks = ddt @ dt_weight.to(dtype).unsqueeze(1)  # (routes, batch, pixels, rank)
    dprojected = torch.cat((dBC.to(dtype), dranks.permute(1, 2, 0, 3)), dim=-1)
    dprojected = F.pad(dprojected, (0, row_length(x_proj_weight) - 2 * N - rank))
    dx, dx_proj_weight = project_backward(x, x_proj_weight, rank, du, dprojected)
    return (
        dx, dx_proj_weight, ddt_weight.to(dt_weight.dtype),
        dbias if dt_bias is not None else A.new_empty(0), dA, dD if D is not None else A.new_empty(0),
    )  # fmt: skip


@_cross_backward.register_fake
def _(dy, x, x_proj_weight, dt_weight, dt_bias, A, D, states, codes):
    return gradients_like(x, x_proj_weight, dt_weight, dt_bias, A, D)


def _cross_setup(ctx, inputs, output):
    *tensors, ctx.codes, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _cross_autograd(ctx, dy, _):
    *tensors, states = ctx.saved_tensors
    gradients = _cross_backward(dy, *tensors, states, ctx.codes)
    return *present(gradients, tensors), None, None, None


_cross.register_autograd(_cross_autograd, setup_context=_cross_setup)


# The sequence operator: a group is a route of its own channels, in row order.


def _sequence(u, delta, A, B, C, D, delta_bias, softplus: bool) -> tuple[Plan, tuple[Tensor, ...]]:
    batch, channels, length = u.shape
    groups, N = B.shape[1], A.shape[1]
    dim = channels // groups
    check_size(1, length)
    strides = (channels * length, dim * length, 1, length)
    plan = Plan(
        batch, groups, 0, 1, length, dim, N, 0, u_strides=strides, out_strides=strides[:2],
        B_strides=(groups * N * length, N * length, 1, length),
        has_bias=delta_bias is not None, has_skip=D is not None, softplus=softplus,
    )  # fmt: skip
    inputs = (
        u.contiguous(), delta.contiguous(), B.contiguous(), C.contiguous(), A,
        stand_in(delta_bias, A), _scaled(A.unflatten(0, (groups, dim))), stand_in(D, A),
    )  # fmt: skip
    return plan, inputs


@torch.library.custom_op("vmamba::selective_scan_triton", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    softplus: bool, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if u.numel() == 0:
        return u.new_zeros(u.shape, dtype=out_dtype), _sequence_states_like(u, A, B, save)
    plan, inputs = _sequence(u, delta, A, B, C, D, delta_bias, softplus)
    y = u.new_empty(u.shape, dtype=out_dtype)
    return y, _forward(plan, *inputs, y, save)


def _sequence_states_like(u: Tensor, A: Tensor, B: Tensor, save: bool) -> Tensor:
    if not save:
        return u.new_empty(0, dtype=torch.float32)
    chunks, groups = (u.shape[2] + CHUNK - 1) // CHUNK, B.shape[1]
    return u.new_empty(u.shape[0], groups, chunks, A.shape[1], u.shape[1] // groups, dtype=torch.float32)


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save):
    return u.new_empty(u.shape, dtype=out_dtype), _sequence_states_like(u, A, B, save)


@torch.library.custom_op("vmamba::selective_scan_triton_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, states: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = gradients_like(u, delta, A, B, C, D, delta_bias)
    if u.numel() == 0:
        return tuple(torch.zeros_like(t) for t in gradients)
    plan, inputs = _sequence(u, delta, A, B, C, D, delta_bias, softplus)
    du, ddelta, _, dB, dC, *_ = gradients
    dBC, dA, dbias, dD = _backward(plan, *inputs, dy.contiguous(), plan.out_strides, states, du, ddelta)
    for part, whole in zip(dBC.permute(0, 2, 3, 1).split(plan.N, dim=2), (dB, dC), strict=True):
        whole.copy_(part)  # (batch, groups, states, length); outputs of an operator share no memory
    return (
        du, ddelta, dA.view(A.shape), dB, dC,
        dD.view(-1) if D is not None else A.new_empty(0), dbias.view(-1) if delta_bias is not None else A.new_empty(0),
    )  # fmt: skip


@_scan_backward.register_fake
def _(dy, u, delta, A, B, C, D, delta_bias, states, softplus):
    return gradients_like(u, delta, A, B, C, D, delta_bias)


def _scan_setup(ctx, inputs, output):
    *tensors, ctx.softplus, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _scan_autograd(ctx, dy, _):
    *tensors, states = ctx.saved_tensors
    gradients = _scan_backward(dy, *tensors, states, ctx.softplus)
    return *present(gradients, tensors), None, None, None


_scan.register_autograd(_scan_autograd, setup_context=_scan_setup)
