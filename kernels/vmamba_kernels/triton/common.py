"""What the scan and the SSD kernels share: routes as address arithmetic, the softplus, the pass over chunk states."""

from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..registry import BackendError

LOG2E = 1.4426950408889634
LARGEST_OFFSET = (1 << 31) - 1  # inside one image; beyond it its offsets take 64 bits, as batch and route offsets do
MAX_LENGTH = (1 << 30) - (1 << 10)  # positions that route_pixels counts in 32 bits
MAX_HEIGHT = 1 << 22  # of a column that it divides by in float32

ROUTE_CODES = {"row": 0, "col": 1, "row_rev": 2, "col_rev": 3}  # bit 0: by columns, bit 1: backwards
MAX_ROUTES = 31  # two bits each in one non-negative 64-bit number


def encode_routes(routes: tuple[str, ...]) -> int:
    """Routes as one integer, the first in the lowest two bits."""
    return sum(ROUTE_CODES[route] << 2 * k for k, route in enumerate(routes))


def passes_32_bits(*sizes: int) -> bool:
    """Whether kernels must be told to be WIDE; sizes: an index's largest value times its stride, for each."""
    return max(sizes) > LARGEST_OFFSET


def check_size(height: int, width: int) -> None:
    """Raises BackendError for an image, or a sequence as an image of one row, that `route_pixels` would misnumber."""
    if height * width > MAX_LENGTH or height > MAX_HEIGHT:
        raise BackendError(
            f"backend 'triton' walks up to {MAX_LENGTH:,} positions in columns of up to {MAX_HEIGHT:,}, not {height:,} "
            f"x {width:,}; cut them, or take backend='reference'"
        )


@triton.jit
def probe_kernel():
    pass


@cache
def why_not_on(index: int) -> str | None:
    """One sentence why Triton cannot compile for GPU `index` or load what it compiled, or None: an empty kernel is
    tried.  It needs a C compiler for what launches it, and a driver that takes its code."""
    try:
        with torch.cuda.device(index):
            _ = probe_kernel.warmup(grid=(1,)).run
    except Exception as error:  # of several classes, subprocess's and Triton's own among them
        return f"Triton {triton.__version__} cannot compile or load a kernel here ({error})"
    return None


def on_device(x: Tensor) -> AbstractContextManager:
    """Make x's GPU current, which is the one Triton launches on; nothing for a CPU tensor."""
    return torch.cuda.device_of(x)


def projection_dtype(x: Tensor) -> torch.dtype:
    """Of projections and of gradients between kernels: x's, but float32 for float16, whose range is too small."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def project(x: Tensor, x_proj_weight: Tensor, rank: int) -> Tensor:
    """Every pixel's B, C and step numbers of each route, in this order and padded to 16 bytes in bfloat16.

    x (batch, height, width, dim), x_proj_weight (routes, rank + 2*states, dim) -> (batch, pixels, routes, row).
    """
    dtype = projection_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        projected = x.to(dtype).flatten(1, 2) @ _packed(x_proj_weight, rank).to(dtype).t()
    return projected.unflatten(-1, (x_proj_weight.shape[0], -1))


def project_backward(
    x: Tensor, x_proj_weight: Tensor, rank: int, du: Tensor, dprojected: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and x_proj_weight, given dprojected as `project` returns and du (routes, batch, pixels, dim)."""
    dtype, dim = projection_dtype(x), x.shape[-1]
    routes, rows, _ = x_proj_weight.shape
    dprojected = dprojected.flatten(0, 1).flatten(1)  # (batch*pixels, routes*row)
    with torch.autocast(x.device.type, enabled=False):
        dweight = (dprojected.t() @ x.reshape(-1, dim).to(dtype)).unflatten(0, (routes, -1))
        dx = torch.addmm(du.sum(0).view(-1, dim), dprojected, _packed(x_proj_weight, rank).to(dtype))
    dweight = torch.cat((dweight[:, rows - rank : rows], dweight[:, : rows - rank]), dim=1)
    return dx.view(x.shape).to(x.dtype), dweight.to(x_proj_weight.dtype)


def row_length(x_proj_weight: Tensor) -> int:
    return triton.cdiv(x_proj_weight.shape[1], 8) * 8


def _packed(x_proj_weight: Tensor, rank: int) -> Tensor:
    by_use = torch.cat((x_proj_weight[:, rank:], x_proj_weight[:, :rank]), dim=1)
    return F.pad(by_use, (0, 0, 0, row_length(x_proj_weight) - by_use.shape[1])).flatten(0, 1)


def gradients_like(*given: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous uninitialised tensors for the gradients; an empty one for what is absent."""
    first = next(t for t in given if t is not None)
    return tuple(first.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def present(gradients: tuple[Tensor, ...], given: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """None for the gradient of what is absent."""
    return tuple(g if t is not None else None for g, t in zip(gradients, given, strict=True))


def stand_in(given: Tensor | None, like: Tensor) -> Tensor:
    """An optional tensor, or an empty one that a kernel takes in its place and does not read."""
    return like.new_empty(0) if given is None else given.contiguous()


def route_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """Of the routes before they are added."""
    return torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32


@triton.jit
def wide(index, WIDE: tl.constexpr):
    """An index that strides will multiply: of 64 bits if offsets inside an image are (LARGEST_OFFSET)."""
    return index.to(tl.int64) if WIDE else index


@triton.jit
def route_pixels(start, steps: tl.constexpr, length, height, width, code, WIDE: tl.constexpr):
    """Pixel indices (row-major) of `steps` positions of a route from `start` on, and which of them are in the image."""
    position = tl.arange(0, steps)
    valid = start + position < length
    by_column = (code & 1) == 1
    backwards = (code & 2) == 2
    # The route runs along columns of `run` pixels, `stride` apart; in row order the image is one endless run.
    run = tl.where(by_column, height, 1 << 30)
    stride = tl.where(by_column, width, 1)
    first = tl.where(backwards, length - 1 - start, start)
    column = first // run
    within = first - column * run + tl.where(backwards, -position, position)
    # Floor division by a product: exact, since |within| < height + steps is small where the quotient is not 0 or -1.
    over = tl.floor((within.to(tl.float32) + 0.5) * (1.0 / run.to(tl.float32))).to(tl.int32)
    return wide((within - over * run) * stride + column + over, WIDE), valid


@triton.jit
def softplus(v):
    """log(1 + exp(v)) and exp(-|v|), to float32 precision also where exp(v) is far below 1."""
    e = tl.exp(-tl.abs(v))
    # log(1 + e) / e on [0, 1]: interpolated at Chebyshev points, relative error 1.6e-7 in float32.
    q = 0.0195425273 - 0.00317605703 * e
    q = -0.0563736129 + q * e
    q = 0.105436238 + q * e
    q = -0.152696671 + q * e
    q = 0.196632743 + q * e
    q = -0.249516163 + q * e
    q = 0.333297105 + q * e
    q = -0.499998926 + q * e
    q = 0.999999995 + q * e
    return tl.maximum(v, 0.0) + e * q, e


@triton.jit
def sigmoid(v, e):
    """The derivative of softplus(v), given e = exp(-|v|)."""
    return tl.where(v >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def pick(tile, index, i: tl.constexpr):
    """tile[i] along the first axis, whose positions `index` counts.

    As integers: every comparison is known when compiling and x + 0 is x, so that nothing of this is left in the code.
    """
    bits = tl.where(index == i, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def chunk_pass_kernel(states, sums, A2, routes, chunks, dim, size, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Turn the state that each chunk leaves when entered with zero into the state that enters it, in place.

    states (batch, routes, chunks, N, dim); sums (batch, routes, chunks, dim), of the step sizes; A2 (routes, N, dim);
    size: N * dim.
    """
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    sequence = (pid // blocks).to(tl.int64)
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    a2 = tl.load(A2 + (sequence % routes) * size + i, mask, other=0.0)
    carry = tl.zeros([BLOCK], tl.float32)
    for step in range(chunks):
        c = chunks - 1 - step if REVERSE else step
        state = states + (sequence * chunks + c) * size + i
        local = tl.load(state, mask, other=0.0)
        total = tl.load(sums + (sequence * chunks + c) * dim + i % dim, mask, other=0.0)
        tl.store(state, carry, mask)
        carry = tl.exp2(a2 * total) * carry + local


def chunk_pass(states: Tensor, sums: Tensor, A2: Tensor, reverse: bool = False) -> None:
    batch, routes, chunks, N, dim = states.shape
    block = min(256, triton.next_power_of_2(N * dim))
    grid = (batch * routes * triton.cdiv(N * dim, block),)
    chunk_pass_kernel[grid](states, sums, A2, routes, chunks, dim, N * dim, BLOCK=block, REVERSE=reverse)
