"""Kernels of the selective scan, for images and for sequences.

A program walks one route (or group) of one image (or sequence) for a block of channels, in tiles of STEPS positions.
Each thread holds a channel: tiles are [STEPS, N, BLOCK] with the first two axes in registers, so that the recurrence
and the sums over states need no exchange between threads.  Positions behind the end have delta = 0 and u = 0, which
leave the state as it is.

Layouts, with their strides as arguments: u, y, du, dy and step sizes of every channel (batch, route, pixel, channel);
B, C (batch, route, pixel, state).  With RANK, B, C and the step numbers are parts of one row of the projection, C_AT
and DT_AT behind its begin; otherwise they are three tensors.  Always contiguous: A2 = A * log2(e) (routes, N, dim),
w (routes, rank, dim), bias and skip (routes, dim), states (batch, routes, chunks, N, dim).

Offsets between images, routes and blocks are of 64 bits; those inside an image only if WIDE, which whoever launches
sets (`Plan.constants`): then every index that a stride multiplies is.
"""

import triton
import triton.language as tl

from .common import pick, route_pixels, sigmoid, softplus, wide


@triton.jit
def program(routes, segments, dim, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Batch, route, segment, channels and block of this program; neighbours share the projections of their pixels."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK)
    block = pid % blocks
    pid = pid // blocks
    segment = pid % segments
    pid = pid // segments
    channel = wide(block * BLOCK + tl.arange(0, BLOCK), WIDE)
    return (pid // routes).to(tl.int64), (pid % routes).to(tl.int64), segment, channel, block.to(tl.int64)


@triton.jit
def first_row(b, k, B_b, B_k, RANK: tl.constexpr):
    """Offset of an image's and route's first row of B and C; the rows of a projection are padded to 8 numbers."""
    row = b * B_b + k * B_k
    if RANK > 0:
        row = tl.multiple_of(row, 8)
    return row


@triton.jit
def load_tile(u, pixel, channel, mask, stride_l, stride_d):
    return tl.load(u + pixel[:, None] * stride_l + channel[None, :] * stride_d, mask, other=0.0).to(tl.float32)


@triton.jit
def load_step(
    dt, w, bias, pixel, valid, channel, inside, dim, u_l, u_d, B_l,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """delta [STEPS, BLOCK] and its derivative by the step size before bias and softplus.

    RANK 0 reads step sizes of every channel; otherwise they are made here from RANK numbers a pixel, 8 at a time.
    """
    mask = valid[:, None] & inside[None, :]
    if RANK == 0:
        v = load_tile(dt, pixel, channel, mask, u_l, u_d)
    else:
        v = tl.zeros([STEPS, BLOCK], tl.float32)
        for first in tl.static_range(0, RANK, 8):
            r = (first + tl.arange(0, 8)).to(pixel.dtype)
            part_mask = valid[:, None] & (r < RANK)[None, :]
            part = tl.load(dt + pixel[:, None] * B_l + r[None, :], part_mask, other=0.0).to(tl.float32)
            weight_mask = (r < RANK)[:, None] & inside[None, :]
            weight = tl.load(w + r[:, None] * dim + channel[None, :], weight_mask, other=0.0).to(tl.float32)
            # The mask once more, though nothing is behind it: Triton would make the sum of a plain product a matrix
            # product in TF32, which loses digits of float32.
            weight = tl.where(weight_mask[None, :, :], weight[None, :, :], 0.0)
            v += tl.sum(part[:, :, None] * weight, axis=1)
    if HAS_BIAS:
        v += tl.load(bias + channel, inside, other=0.0)[None, :]
    if SOFTPLUS:
        delta, e = softplus(v)
        derivative = sigmoid(v, e)
    else:
        delta = v
        derivative = tl.full([STEPS, BLOCK], 1.0, tl.float32)
    return tl.where(mask, delta, 0.0), tl.where(mask, derivative, 0.0)


@triton.jit
def load_states(B, pixel, valid, state, stride_l, stride_n, N: tl.constexpr):
    """B or C of a tile: [STEPS, NP]."""
    mask = valid[:, None] & (state < N)[None, :]
    return tl.load(B + pixel[:, None] * stride_l + state[None, :] * stride_n, mask, other=0.0).to(tl.float32)


@triton.jit
def scan_fwd_kernel(
    u, dt, B, C, w, bias, A2, skip, y, states, sums,
    routes, codes, segments, chunk, length, height, width, dim,
    u_b, u_k, u_l, u_d, y_b, y_k, B_b, B_k, B_l, B_n,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, C_AT: tl.constexpr, DT_AT: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
    SOFTPLUS: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """MODE "whole": walk the route, writing y.  "save": also the states that enter each chunk.
    "local": walk one chunk from a zero state, writing only the state it leaves and its sum of step sizes.
    "chunk": walk one chunk from the state that enters it, writing y.
    """
    b, k, segment, channel, block = program(routes, segments, dim, BLOCK, WIDE)
    code = (codes >> (2 * (k & 31))) & 3
    inside = channel < dim
    state = wide(tl.arange(0, NP), WIDE)
    index = tl.arange(0, STEPS)[:, None, None]
    u += b * u_b + k * u_k
    y += b * y_b + k * y_k
    row = first_row(b, k, B_b, B_k, RANK)
    dt += b * u_b + k * u_k if RANK == 0 else row + DT_AT
    B += row
    C += row + C_AT
    w += k * RANK * dim
    bias += k * dim
    entry = state[:, None] * dim + channel[None, :]
    kept = (state < N)[:, None] & inside[None, :]
    a2 = tl.load(A2 + k * N * dim + entry, kept, other=0.0)
    chunks = tl.cdiv(length, chunk)
    sequence = (b * routes + k) * chunks
    if HAS_SKIP:
        d_skip = tl.load(skip + k * dim + channel, inside, other=0.0)
    if MODE == "chunk":
        h = tl.load(states + (sequence + segment) * N * dim + entry, kept, other=0.0)
    else:
        h = tl.zeros([NP, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    begin = 0
    end = length
    if MODE == "chunk" or MODE == "local":
        begin = segment * chunk
        end = tl.minimum(begin + chunk, length)
    for start in range(begin, end, STEPS):
        if MODE == "save" and start % chunk == 0:
            tl.store(states + (sequence + start // chunk) * N * dim + entry, h, kept)
        pixel, valid = route_pixels(start, STEPS, length, height, width, code, WIDE)
        mask = valid[:, None] & inside[None, :]
        x = load_tile(u, pixel, channel, mask, u_l, u_d)
        b_tile = load_states(B, pixel, valid, state, B_l, B_n, N)
        delta, _ = load_step(
            dt, w, bias, pixel, valid, channel, inside, dim, u_l, u_d, B_l,
            STEPS, BLOCK, RANK, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip
        decay = tl.exp2(delta[:, None, :] * a2[None, :, :])
        entering = (delta * x)[:, None, :] * b_tile[:, :, None]
        hs = tl.zeros([STEPS, NP, BLOCK], tl.float32)
        for i in tl.static_range(STEPS):
            h = pick(decay, index, i) * h + pick(entering, index, i)
            hs = tl.where(index == i, h[None, :, :], hs)
        if MODE == "local":
            total += tl.sum(delta, axis=0)
        else:
            c_tile = load_states(C, pixel, valid, state, B_l, B_n, N)
            out = tl.sum(hs * c_tile[:, :, None], axis=1)
            if HAS_SKIP:
                out += d_skip[None, :] * x
            tl.store(y + pixel[:, None] * u_l + channel[None, :] * u_d, out.to(y.dtype.element_ty), mask)
    if MODE == "local":
        tl.store(states + (sequence + segment) * N * dim + entry, h, kept)
        tl.store(sums + (sequence + segment) * dim + channel, total, inside)


@triton.jit
def scan_adjoint_kernel(
    dy, dt, C, w, bias, A2, adjoints, sums,
    routes, codes, segments, chunk, length, height, width, dim,
    u_b, u_k, u_l, u_d, dy_b, dy_k, B_b, B_k, B_l, B_n,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, C_AT: tl.constexpr, DT_AT: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What one chunk, walked back from zero, passes to the chunk before it: the gradient of the state entering it.
    Also its sum of step sizes."""
    b, k, segment, channel, block = program(routes, segments, dim, BLOCK, WIDE)
    code = (codes >> (2 * (k & 31))) & 3
    inside = channel < dim
    state = wide(tl.arange(0, NP), WIDE)
    index = tl.arange(0, STEPS)[:, None, None]
    dy += b * dy_b + k * dy_k
    row = first_row(b, k, B_b, B_k, RANK)
    dt += b * u_b + k * u_k if RANK == 0 else row + DT_AT
    C += row + C_AT
    w += k * RANK * dim
    bias += k * dim
    entry = state[:, None] * dim + channel[None, :]
    kept = (state < N)[:, None] & inside[None, :]
    a2 = tl.load(A2 + k * N * dim + entry, kept, other=0.0)
    g = tl.zeros([NP, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    begin = segment * chunk
    tiles = tl.cdiv(tl.minimum(chunk, length - begin), STEPS)
    for tile in range(tiles):
        pixel, valid = route_pixels(begin + (tiles - 1 - tile) * STEPS, STEPS, length, height, width, code, WIDE)
        mask = valid[:, None] & inside[None, :]
        dout = load_tile(dy, pixel, channel, mask, u_l, u_d)
        c_tile = load_states(C, pixel, valid, state, B_l, B_n, N)
        delta, _ = load_step(
            dt, w, bias, pixel, valid, channel, inside, dim, u_l, u_d, B_l,
            STEPS, BLOCK, RANK, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip
        decay = tl.exp2(delta[:, None, :] * a2[None, :, :])
        leaving = dout[:, None, :] * c_tile[:, :, None]
        for i in tl.static_range(STEPS):
            g = pick(decay, index, STEPS - 1 - i) * (pick(leaving, index, STEPS - 1 - i) + g)
        total += tl.sum(delta, axis=0)
    sequence = (b * routes + k) * segments + segment
    tl.store(adjoints + sequence * N * dim + entry, g, kept)
    tl.store(sums + sequence * dim + channel, total, inside)


@triton.jit
def scan_bwd_kernel(
    u, dt, B, C, w, bias, A2, skip, dy, states, adjoints, scratch,
    du, ddt, dB, dC, dA, dbias, dskip,
    routes, codes, segments, chunk, length, height, width, dim,
    u_b, u_k, u_l, u_d, dy_b, dy_k, du_b, du_k, B_b, B_k, B_l, B_n,
    dB_block, dB_b, dB_k, dB_l,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, C_AT: tl.constexpr, DT_AT: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
    SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Walk the route (or, if SPLIT, one chunk of it) backwards, chunk by chunk.

    Each chunk is first walked forwards from the state that enters it, to leave the state entering each tile in
    scratch; then its tiles backwards.  du and ddt are as u; dB and dC (blocks, batch, routes, pixels, N) are sums over
    the channels of a block; dA (batch, segments, routes, N, dim), dbias and dskip over the positions of a segment.
    """
    b, k, segment, channel, block = program(routes, segments, dim, BLOCK, WIDE)
    code = (codes >> (2 * (k & 31))) & 3
    inside = channel < dim
    state = wide(tl.arange(0, NP), WIDE)
    index = tl.arange(0, STEPS)[:, None, None]
    u += b * u_b + k * u_k
    dy += b * dy_b + k * dy_k
    du += b * du_b + k * du_k
    ddt += b * du_b + k * du_k
    row = first_row(b, k, B_b, B_k, RANK)
    dt += b * u_b + k * u_k if RANK == 0 else row + DT_AT
    B += row
    C += row + C_AT
    dB += block * dB_block + b * dB_b + k * dB_k
    dC += block * dB_block + b * dB_b + k * dB_k
    w += k * RANK * dim
    bias += k * dim
    entry = state[:, None] * dim + channel[None, :]
    kept = (state < N)[:, None] & inside[None, :]
    a2 = tl.load(A2 + k * N * dim + entry, kept, other=0.0)
    a = a2 * 0.6931471805599453
    chunks = tl.cdiv(length, chunk)
    sequence = (b * routes + k) * chunks
    scratch += tl.program_id(0).to(tl.int64) * tl.cdiv(chunk, STEPS) * NP * BLOCK
    local = state[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if HAS_SKIP:
        d_skip = tl.load(skip + k * dim + channel, inside, other=0.0)
        dskip_sum = tl.zeros([BLOCK], tl.float32)
    dA_sum = tl.zeros([NP, BLOCK], tl.float32)
    dbias_sum = tl.zeros([BLOCK], tl.float32)
    if SPLIT:
        g = tl.load(adjoints + (sequence + segment) * N * dim + entry, kept, other=0.0)
        steps = 1
    else:
        g = tl.zeros([NP, BLOCK], tl.float32)
        steps = chunks
    for walked in range(steps):
        c = segment if SPLIT else chunks - 1 - walked
        begin = c * chunk
        tiles = tl.cdiv(tl.minimum(chunk, length - begin), STEPS)
        h = tl.load(states + (sequence + c) * N * dim + entry, kept, other=0.0)
        for tile in range(tiles):
            tl.store(scratch + tile * NP * BLOCK + local, h)
            pixel, valid = route_pixels(begin + tile * STEPS, STEPS, length, height, width, code, WIDE)
            x = load_tile(u, pixel, channel, valid[:, None] & inside[None, :], u_l, u_d)
            b_tile = load_states(B, pixel, valid, state, B_l, B_n, N)
            delta, _ = load_step(
                dt, w, bias, pixel, valid, channel, inside, dim, u_l, u_d, B_l,
                STEPS, BLOCK, RANK, HAS_BIAS, SOFTPLUS,
            )  # fmt: skip
            decay = tl.exp2(delta[:, None, :] * a2[None, :, :])
            entering = (delta * x)[:, None, :] * b_tile[:, :, None]
            for i in tl.static_range(STEPS):
                h = pick(decay, index, i) * h + pick(entering, index, i)
        tl.debug_barrier()  # a state may be read back by another thread than wrote it
        for back in range(tiles):
            tile = tiles - 1 - back
            h = tl.load(scratch + tile * NP * BLOCK + local)
            pixel, valid = route_pixels(begin + tile * STEPS, STEPS, length, height, width, code, WIDE)
            mask = valid[:, None] & inside[None, :]
            x = load_tile(u, pixel, channel, mask, u_l, u_d)
            dout = load_tile(dy, pixel, channel, mask, u_l, u_d)
            b_tile = load_states(B, pixel, valid, state, B_l, B_n, N)
            c_tile = load_states(C, pixel, valid, state, B_l, B_n, N)
            delta, derivative = load_step(
                dt, w, bias, pixel, valid, channel, inside, dim, u_l, u_d, B_l,
                STEPS, BLOCK, RANK, HAS_BIAS, SOFTPLUS,
            )  # fmt: skip
            decay = tl.exp2(delta[:, None, :] * a2[None, :, :])
            step = delta * x
            entering = step[:, None, :] * b_tile[:, :, None]
            leaving = dout[:, None, :] * c_tile[:, :, None]
            olds = tl.zeros([STEPS, NP, BLOCK], tl.float32)  # decay * the state before
            for i in tl.static_range(STEPS):
                old = pick(decay, index, i) * h
                olds = tl.where(index == i, old[None, :, :], olds)
                h = old + pick(entering, index, i)
            gs = tl.zeros([STEPS, NP, BLOCK], tl.float32)  # gradient of the state
            for i in tl.static_range(STEPS):
                g = pick(leaving, index, STEPS - 1 - i) + g
                gs = tl.where(index == STEPS - 1 - i, g[None, :, :], gs)
                g = pick(decay, index, STEPS - 1 - i) * g
            states_at = pixel[:, None] * dB_l + state[None, :]
            states_in = valid[:, None] & (state < N)[None, :]
            tl.store(dC + states_at, tl.sum((olds + entering) * dout[:, None, :], axis=2), states_in)
            tl.store(dB + states_at, tl.sum(gs * step[:, None, :], axis=2), states_in)
            from_input = tl.sum(gs * b_tile[:, :, None], axis=1)
            from_decay = gs * olds
            dA_sum += tl.sum(from_decay * delta[:, None, :], axis=0)
            dv = (from_input * x + tl.sum(from_decay * a[None, :, :], axis=1)) * derivative
            dx = from_input * delta
            dbias_sum += tl.sum(dv, axis=0)
            if HAS_SKIP:
                dx += d_skip[None, :] * dout
                dskip_sum += tl.sum(dout * x, axis=0)
            at = pixel[:, None] * u_l + channel[None, :] * u_d
            tl.store(du + at, dx.to(du.dtype.element_ty), mask)
            tl.store(ddt + at, dv.to(ddt.dtype.element_ty), mask)
        tl.debug_barrier()  # the scratch is written again by the next chunk
    piece = (b * segments + segment) * routes + k
    tl.store(dA + piece * N * dim + entry, dA_sum, kept)
    tl.store(dbias + piece * dim + channel, dbias_sum, inside)
    if HAS_SKIP:
        tl.store(dskip + piece * dim + channel, dskip_sum, inside)
