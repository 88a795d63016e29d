"""`cross_ssd`: the scan with one step and one decay a head, by matrix products inside chunks.

A program has one chunk of Q positions of one route of one image, and goes through the heads.  The states entering the
chunks come first: each chunk's own contribution, then the pass over chunks.  Nothing but the inputs is kept for the
backward pass, which makes the states again.

With e[m] = delta[m] * A, decay[i, j] = exp(e[j+1] + ... + e[i]) for i >= j, h the state entering the chunk:

    y[i]  = sum_j C[i].B[j] * decay[i, j] * delta[j] * x[j]  +  exp(e[0] + ... + e[i]) * C[i].h
    h_out = exp(e[0] + ... + e[Q-1]) * h  +  sum_j decay[Q-1, j] * delta[j] * B[j] (x) x[j]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    route_pixels,
    sigmoid,
    softplus,
    stand_in,
    wide,
)

# Measured best (docs/log.md).  With more of either Triton makes wgmma instructions on Hopper, some of them wrong (its
# issue 10629): with 8 warps and chunks of 64 gradients were off by as much as they measured.
MAX_CHUNK = 32
WARPS = 2


def cross_ssd(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    routes: tuple[str, ...],
    chunk_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`vmamba_kernels.cross_ssd`, already checked.  A chunk is 16 positions, or 32 if `chunk_size` allows it."""
    chunk = min(max(triton.next_power_of_2(chunk_size), 16), MAX_CHUNK)
    return _ssd(x, x_proj_weight, dt_bias, A, D, encode_routes(routes), chunk, out_dtype)


@triton.jit
def load_chunk(
    P, code, c, length, height, width, P_l,
    N: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pixels of a chunk, which of them are in the image, and B and C [Q, NP]."""
    pixel, valid = route_pixels(c * Q, Q, length, height, width, code, WIDE)
    state = wide(tl.arange(0, NP), WIDE)
    at = P + pixel[:, None] * P_l + state[None, :]
    mask = valid[:, None] & (state < N)[None, :]
    return pixel, valid, tl.load(at, mask, other=0.0).to(tl.float32), tl.load(at + N, mask, other=0.0).to(tl.float32)


@triton.jit
def load_head(P, bias, A2, pixel, valid, head, P_l, N: tl.constexpr, Q: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Step sizes of a head and their derivative [Q], decay [Q, Q], the decays from the chunk's start and to its end,
    and A * log2(e)."""
    v = tl.load(P + pixel * P_l + 2 * N + head, valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + head)
    delta, e = softplus(v)
    delta = tl.where(valid, delta, 0.0)
    derivative = tl.where(valid, sigmoid(v, e), 0.0)
    a2 = tl.load(A2 + head)
    i = tl.arange(0, Q)[:, None]
    j = tl.arange(0, Q)[None, :]
    # Summed term by term: a difference of two running sums loses the digits of a short span behind a long one.
    span = tl.cumsum(tl.where(i > j, (delta * a2)[:, None], 0.0), axis=0)
    decay = tl.where(i >= j, tl.exp2(span), 0.0)
    to_end = tl.sum(tl.where(i == Q - 1, decay, 0.0), axis=0)
    from_start = tl.exp2(tl.cumsum(delta * a2, axis=0))
    return delta, derivative, decay, from_start, to_end, a2


@triton.jit
def ssd_state_kernel(
    values, P, bias, A2, states, sums, routes, codes, chunks, length, height, width, dim, heads, P_b, P_l, row,
    N: tl.constexpr, NP: tl.constexpr, HEAD: tl.constexpr, HP: tl.constexpr, Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state leaving it (values = x) or, ADJOINT, to the gradient of the state entering it
    (values = dy), and its sums of step sizes."""
    pid = tl.program_id(0)
    c = pid % chunks
    k = (pid // chunks % routes).to(tl.int64)
    b = (pid // chunks // routes).to(tl.int64)
    P += b * P_b + k * row
    values += b * length * dim
    states += ((b * routes + k) * chunks + c) * N * dim
    code = (codes >> (2 * k)) & 3
    pixel, valid, b_tile, c_tile = load_chunk(P, code, c, length, height, width, P_l, N, NP, Q, WIDE)
    state = wide(tl.arange(0, NP), WIDE)
    inner = tl.arange(0, HP)
    for head in range(heads):
        delta, _, _, from_start, to_end, _ = load_head(
            P, bias + k * heads, A2 + k * heads, pixel, valid, head, P_l, N, Q, HAS_BIAS
        )
        channel = head * HEAD + inner
        mask = valid[:, None] & (inner < HEAD)[None, :]
        value = tl.load(values + pixel[:, None] * dim + channel[None, :], mask, other=0.0).to(tl.float32)
        left = c_tile * from_start[:, None] if ADJOINT else b_tile * (delta * to_end)[:, None]
        added = tl.dot(tl.trans(left), value, input_precision=PRECISION)
        kept = (state < N)[:, None] & (inner < HEAD)[None, :]
        tl.store(states + state[:, None] * dim + channel[None, :], added, kept)
        tl.store(sums + ((b * routes + k) * chunks + c) * heads + head, tl.sum(delta, axis=0))


@triton.jit
def ssd_fwd_kernel(
    x, P, bias, A2, skip, states, y, routes, codes, chunks, length, height, width, dim, heads, P_b, P_l, row, y_k,
    N: tl.constexpr, NP: tl.constexpr, HEAD: tl.constexpr, HP: tl.constexpr, Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = pid % chunks
    k = (pid // chunks % routes).to(tl.int64)
    b = (pid // chunks // routes).to(tl.int64)
    P += b * P_b + k * row
    x += b * length * dim
    y += b * length * dim + k * y_k
    states += ((b * routes + k) * chunks + c) * N * dim
    code = (codes >> (2 * k)) & 3
    pixel, valid, b_tile, c_tile = load_chunk(P, code, c, length, height, width, P_l, N, NP, Q, WIDE)
    products = tl.dot(c_tile, tl.trans(b_tile), input_precision=PRECISION)  # [Q, Q]
    state = wide(tl.arange(0, NP), WIDE)
    inner = tl.arange(0, HP)
    for head in range(heads):
        delta, _, decay, from_start, _, _ = load_head(
            P, bias + k * heads, A2 + k * heads, pixel, valid, head, P_l, N, Q, HAS_BIAS
        )
        channel = head * HEAD + inner
        at = pixel[:, None] * dim + channel[None, :]
        mask = valid[:, None] & (inner < HEAD)[None, :]
        x_tile = tl.load(x + at, mask, other=0.0).to(tl.float32)
        kept = (state < N)[:, None] & (inner < HEAD)[None, :]
        h = tl.load(states + state[:, None] * dim + channel[None, :], kept, other=0.0)
        out = tl.dot(products * decay * delta[None, :], x_tile, input_precision=PRECISION)
        out += tl.dot(c_tile, h, input_precision=PRECISION) * from_start[:, None]
        if HAS_SKIP:
            out += tl.load(skip + k * dim + channel, inner < HEAD, other=0.0)[None, :] * x_tile
        tl.store(y + at, out.to(y.dtype.element_ty), mask)


@triton.jit
def ssd_bwd_kernel(
    x, P, bias, A2, skip, states, adjoints, dy, du, dP, dA, dbias, dskip,
    routes, codes, chunks, length, height, width, dim, heads, P_b, P_l, row, du_k,
    N: tl.constexpr, NP: tl.constexpr, HEAD: tl.constexpr, HP: tl.constexpr, Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """du as x, dP as P; dA and dbias (batch, chunks, routes, heads), dskip (batch, chunks, routes, dim)."""
    pid = tl.program_id(0)
    c = pid % chunks
    k = (pid // chunks % routes).to(tl.int64)
    b = (pid // chunks // routes).to(tl.int64)
    P += b * P_b + k * row
    dP += b * P_b + k * row
    x += b * length * dim
    dy += b * length * dim
    du += b * length * dim + k * du_k
    states += ((b * routes + k) * chunks + c) * N * dim
    adjoints += ((b * routes + k) * chunks + c) * N * dim
    piece = (b * chunks + c) * routes + k
    code = (codes >> (2 * k)) & 3
    pixel, valid, b_tile, c_tile = load_chunk(P, code, c, length, height, width, P_l, N, NP, Q, WIDE)
    products = tl.dot(c_tile, tl.trans(b_tile), input_precision=PRECISION)  # [Q, Q]
    state = wide(tl.arange(0, NP), WIDE)
    inner = tl.arange(0, HP)
    i = tl.arange(0, Q)[:, None]
    j = tl.arange(0, Q)[None, :]
    dB = tl.zeros([Q, NP], tl.float32)
    dC = tl.zeros([Q, NP], tl.float32)
    for head in range(heads):
        delta, derivative, decay, from_start, to_end, a2 = load_head(
            P, bias + k * heads, A2 + k * heads, pixel, valid, head, P_l, N, Q, HAS_BIAS
        )
        channel = head * HEAD + inner
        at = pixel[:, None] * dim + channel[None, :]
        mask = valid[:, None] & (inner < HEAD)[None, :]
        x_tile = tl.load(x + at, mask, other=0.0).to(tl.float32)
        dout = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        kept = (state < N)[:, None] & (inner < HEAD)[None, :]
        h = tl.load(states + state[:, None] * dim + channel[None, :], kept, other=0.0)
        g = tl.load(adjoints + state[:, None] * dim + channel[None, :], kept, other=0.0)

        mixing = products * decay  # times delta[j]: what x[j] gives to y[i]
        dmixing = tl.dot(dout, tl.trans(x_tile), input_precision=PRECISION)
        from_g = tl.dot(b_tile, g, input_precision=PRECISION)  # [Q, HP]
        weighted = dmixing * decay * delta[None, :]
        dC += tl.dot(weighted, b_tile, input_precision=PRECISION)
        dC += tl.dot(dout, tl.trans(h), input_precision=PRECISION) * from_start[:, None]
        dB += tl.dot(tl.trans(weighted), c_tile, input_precision=PRECISION)
        dB += tl.dot(x_tile, tl.trans(g), input_precision=PRECISION) * (delta * to_end)[:, None]
        dx = tl.dot(tl.trans(mixing), dout, input_precision=PRECISION) * delta[:, None]
        dx += from_g * (delta * to_end)[:, None]

        # Gradient of e[m]: everything that crosses position m, added without differences.
        inside = dmixing * mixing  # times delta[j]: the share of y[i] from x[j]
        onward = tl.sum(from_g * x_tile, axis=1) * to_end  # times delta[j]: the share of the leaving state from x[j]
        inward = tl.sum(tl.dot(c_tile, h, input_precision=PRECISION) * dout, axis=1) * from_start
        crossing = tl.cumsum(tl.where(i > j, inside * delta[None, :], 0.0), axis=0, reverse=True)
        de = tl.sum(tl.where(i > j, crossing + (delta * onward)[None, :], 0.0), axis=1)
        de += tl.cumsum(inward, axis=0, reverse=True)
        through = tl.exp2(a2 * tl.sum(delta, axis=0)) * tl.sum(tl.sum(g * h, axis=1), axis=0)
        de += tl.where(valid, through, 0.0)
        dv = (de * (a2 * 0.6931471805599453) + tl.sum(inside, axis=0) + onward) * derivative

        if HAS_SKIP:
            dx += tl.load(skip + k * dim + channel, inner < HEAD, other=0.0)[None, :] * dout
            tl.store(dskip + piece * dim + channel, tl.sum(dout * x_tile, axis=0), inner < HEAD)
        tl.store(du + at, dx.to(du.dtype.element_ty), mask)
        tl.store(dP + pixel * P_l + 2 * N + head, dv.to(dP.dtype.element_ty), valid)
        tl.store(dA + piece * heads + head, tl.sum(de * delta, axis=0))
        tl.store(dbias + piece * heads + head, tl.sum(dv, axis=0))
    at_states = dP + pixel[:, None] * P_l + state[None, :]
    mask = valid[:, None] & (state < N)[None, :]
    tl.store(at_states, dB.to(dP.dtype.element_ty), mask)
    tl.store(at_states + N, dC.to(dP.dtype.element_ty), mask)


class _Launch:
    """The sizes of one call, in the order of the kernels, and the states entering its chunks."""

    def __init__(self, x, x_proj_weight, dt_bias, A, D, codes: int, chunk: int):
        batch, height, width, dim = x.shape
        routes, heads = A.shape
        check_size(height, width)
        length = height * width
        self.x = x.contiguous()
        self.projected = project(self.x, x_proj_weight, heads)  # (batch, pixels, routes, row)
        self.N = (x_proj_weight.shape[1] - heads) // 2
        self.A2 = (A * LOG2E).contiguous()
        self.bias, self.skip = stand_in(dt_bias, A), stand_in(D, A)
        self.chunks = triton.cdiv(length, chunk)
        self.grid = (batch * routes * self.chunks,)
        P_b, P_l, row, _ = self.projected.stride()
        self.sizes = (routes, codes, self.chunks, length, height, width, dim, heads, P_b, P_l, row)
        self.constants = {
            "N": self.N,
            "NP": max(16, triton.next_power_of_2(self.N)),
            "HEAD": dim // heads,
            "HP": max(16, triton.next_power_of_2(dim // heads)),
            "Q": chunk,
            "HAS_BIAS": dt_bias is not None,
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            "WIDE": passes_32_bits(length * dim, length * P_l, self.N * dim),
            "num_warps": WARPS,
        }

    def states(self, values: Tensor, adjoint: bool) -> Tensor:
        """The states entering the chunks (values = x), or the gradients of those leaving (adjoint, values = dy)."""
        batch, (routes, heads), dim = self.x.shape[0], self.A2.shape, self.x.shape[3]
        states = self.x.new_empty(batch, routes, self.chunks, self.N, dim, dtype=torch.float32)
        sums = self.x.new_empty(batch, routes, self.chunks, heads, dtype=torch.float32)
        ssd_state_kernel[self.grid](
            values, self.projected, self.bias, self.A2, states, sums, *self.sizes, ADJOINT=adjoint, **self.constants
        )

        def by_channel(t: Tensor) -> Tensor:
            return t.repeat_interleave(dim // heads, dim=-1)

        A2 = by_channel(self.A2).unsqueeze(1).expand(routes, self.N, dim).contiguous()
        chunk_pass(states, by_channel(sums), A2, reverse=adjoint)
        return states


@torch.library.custom_op("vmamba::cross_ssd_triton", mutates_args=())
def _ssd(
    x: Tensor, x_proj_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    codes: int, chunk: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if x.numel() == 0:
        return x.new_zeros(x.shape, dtype=out_dtype)
    call = _Launch(x, x_proj_weight, dt_bias, A, D, codes, chunk)
    y = x.new_empty(A.shape[0], *x.shape, dtype=route_dtype(out_dtype))
    with on_device(x):
        states = call.states(call.x, adjoint=False)
        ssd_fwd_kernel[call.grid](
            call.x, call.projected, call.bias, call.A2, call.skip, states, y, *call.sizes, y.stride(0),
            HAS_SKIP=D is not None, **call.constants,
        )  # fmt: skip
    return y.sum(0, dtype=out_dtype)


@_ssd.register_fake
def _(x, x_proj_weight, dt_bias, A, D, codes, chunk, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.custom_op("vmamba::cross_ssd_triton_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    codes: int, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        return tuple(torch.zeros_like(t) for t in gradients_like(x, x_proj_weight, dt_bias, A, D))
    call = _Launch(x, x_proj_weight, dt_bias, A, D, codes, chunk)
    routes, heads = A.shape
    pieces = x.shape[0] * call.chunks
    dy = dy.contiguous()
    du = x.new_empty(routes, x.shape[0], x.shape[1] * x.shape[2], x.shape[3], dtype=projection_dtype(x))
    dprojected = torch.zeros_like(call.projected)
    dA = A.new_empty(pieces, routes, heads)
    dbias = torch.empty_like(dA)
    dskip = A.new_empty(pieces, routes, x.shape[3]) if D is not None else dbias
    with on_device(x):
        states = call.states(call.x, adjoint=False)
        adjoints = call.states(dy, adjoint=True)
        ssd_bwd_kernel[call.grid](
            call.x, call.projected, call.bias, call.A2, call.skip, states, adjoints, dy, du, dprojected,
            dA, dbias, dskip, *call.sizes, du.stride(0), HAS_SKIP=D is not None, **call.constants,
        )  # fmt: skip
    dx, dx_proj_weight = project_backward(x, x_proj_weight, heads, du, dprojected)
    return (
        dx, dx_proj_weight, dbias.sum(0) if dt_bias is not None else A.new_empty(0), dA.sum(0),
        dskip.sum(0).view(D.shape) if D is not None else A.new_empty(0),
    )  # fmt: skip


@_ssd_backward.register_fake
def _(dy, x, x_proj_weight, dt_bias, A, D, codes, chunk):
    return gradients_like(x, x_proj_weight, dt_bias, A, D)


def _ssd_setup(ctx, inputs, output):
    *tensors, ctx.codes, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors)


def _ssd_autograd(ctx, dy):
    tensors = list(ctx.saved_tensors)
    return *present(_ssd_backward(dy, *tensors, ctx.codes, ctx.chunk), tensors), None, None, None


_ssd.register_autograd(_ssd_autograd, setup_context=_ssd_setup)
