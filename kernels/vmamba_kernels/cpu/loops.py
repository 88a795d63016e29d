"""The inner loops of the cpu backend, as functions of numba: plain loops that LLVM turns into vector instructions of
whatever CPU it is.  docs/kernels-design.md says how they work and what did not pay.

Words: a *block* is 64 neighbouring channels, what the innermost loops run over; a *tile* is 16 steps of a route for one
block, held on the stack; a *pass* is one walk along a route with up to 16 of its states; a *row* is the projection of
one pixel for one route: the ranks of the steps, filled up with zeros to a multiple of 4, then B, then C.  Steps are in
units of ln 2, s = delta / ln 2, so that exp(delta A) = 2^(s A); a state is then h / ln 2, and C gets the ln 2 that
is missing.

What makes them fast: the lengths of the innermost loops are constants, so that nothing is left over; tiles are on the
stack, of which LLVM knows that they do not overlap; what a loop reads once is in a local variable, since a store
through another array might change it.  Sums over channels may be added up in any order (`SUMS`) and nothing else, or
the rounding in `exp2` would be optimised away; what is not finite stays so.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ..folders import own_folder

BLOCK = 64
TILE = 16
STATES = 16  # of a pass
LOG2E, LN2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
ZERO, ONE = np.float32(0), np.float32(1)

EXACT = {"contract", "nsz"}
SUMS = EXACT | {"reassoc"}

_number = njit(fastmath=EXACT, error_model="numpy", forceinline=True)  # a function that keeps its own flags
_part = njit(
    inline="always"
)  # of a kernel: compiled with it, since LLVM does not vectorise again what it takes in later


def _kernel(fastmath: set[str]):
    """A function that is compiled when it is first called and kept on disk, and that lets go of the GIL."""

    def decorate(function):
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(own_folder("cpu"))
        try:
            compiled = njit(fastmath=fastmath, error_model="numpy", nogil=True, cache=True)(function)
        finally:
            numba.config.CACHE_DIR = before
        for name in ("load_overload", "save_overload"):
            setattr(compiled._cache, name, _whatever_is_wrong(getattr(compiled._cache, name)))
        return compiled

    return decorate


def _whatever_is_wrong(access: Callable[..., Any]) -> Callable[..., Any]:
    """Access to the cache on disk that gives None where files are damaged, so that a function is compiled."""

    def careful(*args: Any) -> Any:
        try:
            return access(*args)
        except Exception as error:
            _tell_of_the_cache(type(error).__name__)
            return None

    return careful


@cache  # once
def _tell_of_the_cache(error: str) -> None:
    warnings.warn(
        f"the cache of compiled loops in {own_folder('cpu')} cannot be used ({error}), so they are compiled in every "
        "process; remove it, or free some space",
        stacklevel=2,
    )


@intrinsic
def _stack(context, size):
    """A pointer to `size` floats on the stack, for `carray`; to be called once, outside all loops."""

    def code(context, builder, signature, arguments):
        memory = builder.alloca(ir.FloatType(), size=arguments[0])
        memory.align = 64
        return memory

    return types.CPointer(types.float32)(size), code


@intrinsic
def _in_wide_vectors(context):
    """Vectors of 512 bits in the function that calls it, where the CPU has them; LLVM prefers 256."""

    def code(context, builder, signature, arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own `add` does not know it
        return context.get_dummy_value()

    return types.void(), code


# ------------------------------------------------------------------------------------------------ functions of numbers


@_number
def exp2(x):
    """2 to the power of x, relative error 2e-7; below -126 as at -126, above 127 as at 127."""
    x = min(max(x, np.float32(-126)), np.float32(127))
    shifted = x + np.float32(1.5 * 2**23)  # its last bits are x rounded to an integer
    f = x - (shifted - np.float32(1.5 * 2**23))
    p = np.float32(0.001326472731307149)
    p = p * f + np.float32(0.009671512991189957)
    p = p * f + np.float32(0.05550733581185341)
    p = p * f + np.float32(0.24022242426872253)
    p = p * f + np.float32(0.6931470036506653)
    p = p * f + ONE
    bits = np.float32(p).view(np.int32) + (np.float32(shifted).view(np.int32) << np.int32(23))
    return np.int32(bits).view(np.float32)


@_number
def softplus2(w, z):
    """log2(1 + 2^w) for z = 2^-|w|, relative error 1e-7 (the polynomial is log2(1 + z) / z on [0, 1])."""
    p = np.float32(0.00754917785525322)
    p = p * z + np.float32(-0.042567044496536255)
    p = p * z + np.float32(0.11285616457462311)
    p = p * z + np.float32(-0.19711895287036896)
    p = p * z + np.float32(0.27564141154289246)
    p = p * z + np.float32(-0.35840848088264465)
    p = p * z + np.float32(0.48069295287132263)
    p = p * z + np.float32(-0.7213401794433594)
    p = p * z + np.float32(1.4426950216293335)
    return p * z + max(w, ZERO)


@_kernel(EXACT)
def in_blocks(t, routes, columns, scale):
    """t (routes or fewer, dim, up to `columns`) times scale -> (routes, blocks, columns, BLOCK), zeros in the rest."""
    dim = t.shape[1]
    blocked = np.zeros((routes, (dim + BLOCK - 1) // BLOCK, columns, BLOCK), np.float32)
    for route in range(t.shape[0]):
        for block in range(blocked.shape[1]):
            for column in range(t.shape[2]):
                for c in range(min(BLOCK, dim - block * BLOCK)):
                    blocked[route, block, column, c] = scale * t[route, block * BLOCK + c, column]
    return blocked


# ------------------------------------------------------------------------------------------------- steps by themselves


@_kernel(EXACT)
def steps_fwd(delta, bias, softplus, out, start, stop):
    """delta (batch, channels, length) and bias (channels,) -> out, the steps of channels start..stop."""
    _in_wide_vectors()
    for channel in range(start, stop):
        for sequence in range(delta.shape[0]):
            for t in range(delta.shape[2]):
                step = delta[sequence, channel, t] + bias[channel]
                if softplus:
                    step = LN2 * softplus2(LOG2E * step, exp2(-abs(LOG2E * step)))
                out[sequence, channel, t] = step


@_kernel(SUMS)
def steps_bwd(delta, bias, softplus, d_out, d_delta, d_bias, start, stop):
    """The gradients of steps_fwd; d_bias starts as zeros."""
    _in_wide_vectors()
    for channel in range(start, stop):
        for sequence in range(delta.shape[0]):
            total = ZERO
            for t in range(delta.shape[2]):
                step, slope = delta[sequence, channel, t] + bias[channel], ONE
                if softplus:
                    z = exp2(-abs(LOG2E * step))
                    slope = (ONE if step >= ZERO else z) / (ONE + z)
                d_delta[sequence, channel, t] = slope * d_out[sequence, channel, t]
                total += d_delta[sequence, channel, t]
            d_bias[channel] += total


# ------------------------------------------------------------------------------------------------- a tile of one route


@_part
def find_pixels(pixels, first, count, kind, height, width):
    """The pixels of `count` steps from step `first` on."""
    for t in range(count):
        step = first + t
        if kind >= 2:  # backwards
            step = height * width - 1 - step
        if kind & 1:  # by columns
            column = step // height
            step = (step - column * height) * width + column
        pixels[t] = step


@_part
def read_tile(source, image, pixels, count, channel, channels, tile):
    """source (images, pixels, channels) -> tile; zeros beyond `channels`, which sums over a block take too."""
    for t in range(count):
        pixel = pixels[t]
        if channels == BLOCK:
            for c in range(BLOCK):
                tile[t, c] = source[image, pixel, channel + c]
        else:
            for c in range(channels):
                tile[t, c] = source[image, pixel, channel + c]
            for c in range(channels, BLOCK):
                tile[t, c] = ZERO


@_part
def write_tile(tile, image, pixels, count, channel, channels, overwrite, target):
    """tile -> target (images, pixels, channels), in the place of what is there or added to it."""
    for t in range(count):
        pixel = pixels[t]
        if channels < BLOCK:
            for c in range(channels):
                before = ZERO if overwrite else target[image, pixel, channel + c]
                target[image, pixel, channel + c] = before + tile[t, c]
        elif overwrite:
            for c in range(BLOCK):
                target[image, pixel, channel + c] = tile[t, c]
        else:
            for c in range(BLOCK):
                target[image, pixel, channel + c] += tile[t, c]


@_part
def project_steps(rows, image, pixels, count, route, weight, bias, tile):
    """The steps before their softplus: weight (ranks, BLOCK) times each row's ranks, plus the bias."""
    for t in range(count):
        pixel = pixels[t]
        for c in range(BLOCK):
            tile[t, c] = bias[c]
        for r in range(0, weight.shape[0], 4):
            p0, p1 = rows[image, pixel, route, r], rows[image, pixel, route, r + 1]
            p2, p3 = rows[image, pixel, route, r + 2], rows[image, pixel, route, r + 3]
            for c in range(BLOCK):
                tile[t, c] += p0 * weight[r, c] + p1 * weight[r + 1, c] + p2 * weight[r + 2, c] + p3 * weight[r + 3, c]


@_part
def read_steps(delta, rows, image, pixels, count, route, weight, bias, channel, channels, tile):
    """The steps before their softplus, projected; given where the weight has no ranks."""
    if weight.shape[0]:
        project_steps(rows, image, pixels, count, route, weight, bias, tile)
    else:
        read_tile(delta, image, pixels, count, channel, channels, tile)
        for t in range(count):
            for c in range(BLOCK):
                tile[t, c] = LOG2E * tile[t, c] + bias[c]


@_part
def project_bwd(rows, image, pixels, count, route, weight, ds, d_rows, d_weight):
    """The gradients of project_steps, added to d_rows and d_weight; weight is in units of ln 2, which ds is not."""
    for t in range(count):
        pixel = pixels[t]
        for r in range(0, weight.shape[0], 4):
            d0, d1, d2, d3 = ZERO, ZERO, ZERO, ZERO
            for c in range(BLOCK):
                d0 += ds[t, c] * weight[r, c]
                d1 += ds[t, c] * weight[r + 1, c]
                d2 += ds[t, c] * weight[r + 2, c]
                d3 += ds[t, c] * weight[r + 3, c]
            d_rows[image, pixel, route, r] += LN2 * d0
            d_rows[image, pixel, route, r + 1] += LN2 * d1
            d_rows[image, pixel, route, r + 2] += LN2 * d2
            d_rows[image, pixel, route, r + 3] += LN2 * d3
    for r in range(weight.shape[0]):
        for t in range(0, count - 3, 4):
            p0, p1 = rows[image, pixels[t], route, r], rows[image, pixels[t + 1], route, r]
            p2, p3 = rows[image, pixels[t + 2], route, r], rows[image, pixels[t + 3], route, r]
            for c in range(BLOCK):
                d_weight[r, c] += p0 * ds[t, c] + p1 * ds[t + 1, c] + p2 * ds[t + 2, c] + p3 * ds[t + 3, c]
        for t in range(count // 4 * 4, count):
            p0 = rows[image, pixels[t], route, r]
            for c in range(BLOCK):
                d_weight[r, c] += p0 * ds[t, c]


@_part
def walk_again(rows, image, pixels, count, of_pass, route, at_B, s, u, a, border, decays, decayed):
    """The states of a pass over again, from those at the tile's border: (states, BLOCK) like a.

    decays, decayed (steps, states, BLOCK): the decay at a step, and with it the state of the step before.
    """
    for n in range(of_pass):
        for c in range(BLOCK):
            decays[0, n, c] = exp2(s[0, c] * a[n, c])
            decayed[0, n, c] = decays[0, n, c] * border[n, c]
    for t in range(1, count):
        for n in range(of_pass):
            B = rows[image, pixels[t - 1], route, at_B + n]
            for c in range(BLOCK):
                before = decayed[t - 1, n, c] + s[t - 1, c] * u[t - 1, c] * B
                decays[t, n, c] = exp2(s[t, c] * a[n, c])
                decayed[t, n, c] = decays[t, n, c] * before


@_part
def walk_back(
    rows, image, pixels, count, of_pass, route, at_B, at_C, s, u, a, slope, g, decays, decayed, carry,
    du, ds, d_a, d_rows,
):  # fmt: skip
    """The gradients of a pass: of the pixels (du) and the steps before their softplus (ds); those of A and of the rows
    are added to.  g: the output's; carry (states, BLOCK): the states', from a step to the one before."""
    for t in range(count - 1, -1, -1):
        pixel = pixels[t]
        for c in range(BLOCK):
            du[t, c] = ZERO
            ds[t, c] = ZERO
        for n in range(of_pass):
            B, C = rows[image, pixel, route, at_B + n], LN2 * rows[image, pixel, route, at_C + n]
            dB, dC = ZERO, ZERO
            for c in range(BLOCK):
                su = s[t, c] * u[t, c]
                dh = C * g[t, c] + carry[n, c]
                dB += dh * su
                dC += (decayed[t, n, c] + su * B) * g[t, c]
                du[t, c] += dh * B
                d_exponent = dh * decayed[t, n, c]
                ds[t, c] += d_exponent * a[n, c]
                d_a[n, c] += d_exponent * s[t, c]
                carry[n, c] = decays[t, n, c] * dh
            d_rows[image, pixel, route, at_B + n] += dB
            d_rows[image, pixel, route, at_C + n] += LN2 * dC
        for c in range(BLOCK):
            # exp2's derivative has a ln 2, and dt = ln 2 times the step has its inverse
            ds[t, c] = slope[t, c] * (ds[t, c] + LOG2E * du[t, c] * u[t, c])
            du[t, c] *= s[t, c]


# ------------------------------------------------------------------------------------------------------------- a scan
#
# Of both kernels: x (images, pixels, channels); delta the same, of sequences, where weight has no ranks; rows
# (images, pixels, routes, ranks + 2 states); weight (routes, blocks, ranks, BLOCK), bias and skip (routes, blocks,
# BLOCK), A (routes, blocks, states, BLOCK): weight and bias in units of ln 2.  table (routes, 5): a route's kind, its
# first channel, its slot of the output, whether it overwrites what is there, whether it has a skip.  dim: channels of a
# route.  borders (images, routes, tiles, states, blocks, BLOCK): the states at the start of each tile, or empty.  The
# routes of an image are `parts` tasks, or so many for each block; tasks start..stop are done.


@_kernel(EXACT)
def scan_fwd(
    x, delta, rows, weight, bias, A, skip, table, dim, height, width, softplus, out, borders, parts, start, stop
):  # fmt: skip
    """out (slots, images, pixels, channels)."""
    _in_wide_vectors()
    routes, blocks, states, _ = A.shape
    ranks, length = weight.shape[2], height * width
    h = carray(_stack(STATES * BLOCK), (STATES, BLOCK))
    a = carray(_stack(STATES * BLOCK), (STATES, BLOCK))
    s = carray(_stack(TILE * BLOCK), (TILE, BLOCK))
    u = carray(_stack(TILE * BLOCK), (TILE, BLOCK))
    y = carray(_stack(TILE * BLOCK), (TILE, BLOCK))
    pixels = np.empty(TILE, np.uint64)
    for task in range(start, stop):
        image, part, block = task // (parts * blocks), task // blocks % parts, task % blocks
        channels = min(BLOCK, dim - block * BLOCK)
        for route in range(part * routes // parts, (part + 1) * routes // parts):
            kind, channel, slot = table[route, 0], table[route, 1] + block * BLOCK, table[route, 2]
            weight_here, bias_here = weight[route, block], bias[route, block]
            for first_state in range(0, states, STATES):
                of_pass = min(STATES, states - first_state)
                overwrite = first_state == 0 and table[route, 3] != 0
                for n in range(of_pass):
                    for c in range(BLOCK):
                        h[n, c] = ZERO
                        a[n, c] = A[route, block, first_state + n, c]
                for first in range(0, length, TILE):
                    count = min(TILE, length - first)
                    find_pixels(pixels, first, count, kind, height, width)
                    if borders.size:
                        for n in range(of_pass):
                            for c in range(BLOCK):
                                borders[image, route, first // TILE, first_state + n, block, c] = h[n, c]
                    read_tile(x, image, pixels, count, channel, channels, u)
                    read_steps(delta, rows, image, pixels, count, route, weight_here, bias_here, channel, channels, s)
                    if first_state == 0:
                        for t in range(count):
                            for c in range(BLOCK):
                                y[t, c] = skip[route, block, c] * u[t, c]
                    else:
                        y[:] = ZERO
                    for t in range(count):
                        for c in range(BLOCK):
                            if softplus:
                                s[t, c] = softplus2(s[t, c], exp2(-abs(s[t, c])))
                            u[t, c] *= s[t, c]
                    for t in range(count):
                        pixel = pixels[t]
                        for n in range(of_pass):
                            B = rows[image, pixel, route, ranks + first_state + n]
                            C = LN2 * rows[image, pixel, route, ranks + states + first_state + n]
                            for c in range(BLOCK):
                                h[n, c] = exp2(s[t, c] * a[n, c]) * h[n, c] + u[t, c] * B
                                y[t, c] += C * h[n, c]
                    write_tile(y, image, pixels, count, channel, channels, overwrite, out[slot])


@_kernel(SUMS)
def scan_bwd(
    x, delta, rows, weight, bias, A, skip, table, dim, height, width, softplus, borders, dy,
    dx, d_delta, d_rows, d_weight, d_bias, d_A, d_skip, parts, start, stop,
):  # fmt: skip
    """dx as scan_fwd's out; d_rows starts as zeros; those of the weights (images, *their shapes), of each image."""
    _in_wide_vectors()
    routes, blocks, states, _ = A.shape
    ranks, length = weight.shape[2], height * width
    carry = carray(_stack(STATES * BLOCK), (STATES, BLOCK))  # of the states' gradient, to the step before
    a = carray(_stack(STATES * BLOCK), (STATES, BLOCK))
    d_a = carray(_stack(STATES * BLOCK), (STATES, BLOCK))
    u = carray(_stack(TILE * BLOCK), (TILE, BLOCK))
    s = carray(_stack(TILE * BLOCK), (TILE, BLOCK))
    slope = carray(_stack(TILE * BLOCK), (TILE, BLOCK))  # of the softplus
    g = carray(_stack(TILE * BLOCK), (TILE, BLOCK))  # the output's gradient
    du = carray(_stack(TILE * BLOCK), (TILE, BLOCK))
    ds = carray(_stack(TILE * BLOCK), (TILE, BLOCK))
    # Memory of a size that is not known here: LLVM takes ten times as long for large constants.
    kept = min(states, STATES)
    decays = carray(_stack(TILE * kept * BLOCK), (TILE, kept, BLOCK))
    decayed = carray(_stack(TILE * kept * BLOCK), (TILE, kept, BLOCK))
    pixels = np.empty(TILE, np.uint64)
    for task in range(start, stop):
        image, part = task // parts, task % parts
        for route in range(part * routes // parts, (part + 1) * routes // parts):
            kind, slot = table[route, 0], table[route, 2]
            for first_state in range(0, states, STATES):
                of_pass, at_B = min(STATES, states - first_state), ranks + first_state
                overwrite = first_state == 0 and table[route, 3] != 0
                for block in range(blocks):
                    channel, channels = table[route, 1] + block * BLOCK, min(BLOCK, dim - block * BLOCK)
                    d_weight_here, d_bias_here = d_weight[image, route, block], d_bias[image, route, block]
                    weight_here, bias_here = weight[route, block], bias[route, block]
                    for n in range(of_pass):
                        for c in range(BLOCK):
                            carry[n, c] = ZERO
                            d_a[n, c] = ZERO
                            a[n, c] = A[route, block, first_state + n, c]
                    for first in range((length - 1) // TILE * TILE, -1, -TILE):
                        count = min(TILE, length - first)
                        find_pixels(pixels, first, count, kind, height, width)
                        read_tile(x, image, pixels, count, channel, channels, u)
                        read_tile(dy, image, pixels, count, channel, channels, g)
                        read_steps(
                            delta, rows, image, pixels, count, route, weight_here, bias_here, channel, channels, s
                        )  # fmt: skip
                        if softplus:
                            for t in range(count):
                                for c in range(BLOCK):
                                    z = exp2(-abs(s[t, c]))
                                    slope[t, c] = (ONE if s[t, c] >= ZERO else z) / (ONE + z)
                                    s[t, c] = softplus2(s[t, c], z)
                        else:
                            slope[:] = ONE
                        border = borders[image, route, first // TILE, first_state:, block]
                        walk_again(rows, image, pixels, count, of_pass, route, at_B, s, u, a, border, decays, decayed)
                        walk_back(
                            rows, image, pixels, count, of_pass, route, at_B, at_B + states, s, u, a, slope, g,
                            decays, decayed, carry, du, ds, d_a, d_rows,
                        )  # fmt: skip
                        if first_state == 0:
                            for t in range(count):
                                for c in range(BLOCK):
                                    du[t, c] += skip[route, block, c] * g[t, c]
                            if table[route, 4]:
                                for t in range(count):
                                    for c in range(BLOCK):
                                        d_skip[image, route, block, c] += u[t, c] * g[t, c]
                        write_tile(du, image, pixels, count, channel, channels, overwrite, dx[slot])
                        for t in range(count):
                            for c in range(BLOCK):
                                d_bias_here[c] += ds[t, c]
                        if ranks:
                            project_bwd(rows, image, pixels, count, route, weight_here, ds, d_rows, d_weight_here)
                        else:
                            write_tile(ds, image, pixels, count, channel, channels, first_state == 0, d_delta)
                    for n in range(of_pass):
                        for c in range(BLOCK):
                            d_A[image, route, block, first_state + n, c] = LN2 * d_a[n, c]
