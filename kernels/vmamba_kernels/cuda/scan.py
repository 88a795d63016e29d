"""The launches that both operators share: a scan over sequences of pixels, forward and backward.

Everything is channels last.  A sequence is one route of one image, or one group of one sequence of the 1-D operator:
pixels (batch, length, channels), rows (batch, length, routes, row width), outputs (batch, length, routes, dim).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .compiler import Module, load
from .layout import Layout


@dataclass(frozen=True)
class Geometry:
    """The image and how its routes walk it."""

    batch: int
    height: int
    width: int
    routes: int
    kinds: int  # two bits a route: 0 rows, 1 columns, 2 rows reversed, 3 columns reversed
    pixel_stride: int  # of x, in elements
    route_stride: int  # of x: 0 when the routes share the channels

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def pixels(self) -> int:
        return self.batch * self.length

    @property
    def sequences(self) -> int:
        return self.batch * self.routes

    def arguments(self, dim: int) -> tuple[int, ...]:
        """The kernels' arguments in their order; the last is a division by the height as a multiplication."""
        shift = 31 + (self.height - 1).bit_length()
        division = -(-(1 << shift) // self.height) << 6 | shift
        return self.height, self.width, dim, self.routes, self.kinds, self.pixel_stride, self.route_stride, division


@cache
def _limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a block can have)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _blocks(threads: int, block: int = 256) -> int:
    return min(-(-threads // block), 1 << 20)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at an address that 16-byte reads can start from."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pass_borders(
    module: Module, state: Tensor, total: Tensor, A: Tensor, to: Tensor, layout: Layout, geometry: Geometry,
    segments: int, chunks: int, per_route: int, adjoint: bool,
) -> None:  # fmt: skip
    count = geometry.sequences * layout.states * layout.dim
    module.scan_borders_kernel(
        _blocks(count), 256, 0, state, total, A, to, count, layout.dim, geometry.routes, segments, chunks, per_route,
        int(adjoint),
    )  # fmt: skip


def forward(
    layout: Layout, geometry: Geometry, x: Tensor, steps: Tensor | None, rows: Tensor, dt_weight: Tensor | None,
    dt_bias: Tensor | None, A: Tensor, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every route's output (divided by ln 2), and the states at chunk borders if `save`.

    Returns:
        (batch, length, routes, dim) in the layout's route dtype, (batch, routes, borders, states, dim) float32.
    """
    device, length = x.device, geometry.length
    module = load("scan_fwd.cu", layout.fwd_macros, device)
    threads, blocks = 32 * layout.fwd_warps, -(-layout.fwd_groups // layout.fwd_warps)
    segment, segments = layout.segments(geometry.sequences, length, layout.fwd_groups, _limits(device)[0])
    chunk = layout.chunk if save else segment
    borders_per_route = -(-length // chunk) - 1
    y = x.new_empty(geometry.batch, length, geometry.routes, layout.dim, dtype=layout.route_dtype)
    borders = A.new_empty(geometry.batch, geometry.routes, borders_per_route, layout.states, layout.dim)
    inputs = x, steps, rows, dt_weight, dt_bias, A
    grid = geometry.sequences * segments * blocks
    if segments > 1:
        state = A.new_empty(geometry.sequences, segments, layout.states, layout.dim)
        total = A.new_empty(geometry.sequences, segments, layout.dim)
        sizes = *geometry.arguments(layout.dim), segment, segments
        module.scan_summary_kernel(grid, threads, 0, *inputs, state, total, *sizes)
        _pass_borders(
            module, state, total, A, borders, layout, geometry, segments, segment // chunk, borders_per_route, False
        )
    sizes = *geometry.arguments(layout.dim), chunk, segment, segments
    module.scan_fwd_kernel(grid, threads, 0, *inputs, y, borders, *sizes)
    return y, borders


@dataclass
class Gradients:
    x: Tensor  # (batch, length, routes, dim): a route's share, through the recurrence, divided by ln 2
    rows: Tensor  # (batch, length, routes, row width); the steps' columns only if the layout is fused
    steps: Tensor | None  # (batch, length, routes, dim), unless fused
    dt_weight: Tensor | None  # (routes, dim, rank), if fused
    A: Tensor  # (routes, dim, states) float32
    dt_bias: Tensor  # (routes, dim) float32
    D: Tensor  # (routes, dim) float32, of one route at every route: only their sum reaches the output


def backward(
    layout: Layout, geometry: Geometry, x: Tensor, steps: Tensor | None, rows: Tensor,
    dt_weight: Tensor | None, dt_bias: Tensor | None, A: Tensor, dy: Tensor, borders: Tensor,
) -> Gradients:  # fmt: skip
    """The gradients of `forward`'s output times ln 2, plus D x."""
    device, length, dim, states = x.device, geometry.length, layout.dim, layout.states
    processors, shared_limit = _limits(device)
    warps = layout.bwd_warps(shared_limit)
    tiles = layout.bwd_tiles(warps)
    module = load("scan_bwd.cu", layout.bwd_macros(warps), device)
    segment, segments = layout.segments(geometry.sequences, length, tiles * warps, processors)
    inputs = dt_weight, dt_bias, A
    exits = None
    if segments > 1:
        fwd = load("scan_fwd.cu", layout.fwd_macros, device)
        blocks = -(-layout.fwd_groups // layout.fwd_warps)
        state = A.new_empty(geometry.sequences, segments, states, dim)
        total = A.new_empty(geometry.sequences, segments, dim)
        exits = A.new_empty(geometry.sequences, segments, states, dim)
        fwd.scan_adjoint_kernel(
            geometry.sequences * segments * blocks, 32 * layout.fwd_warps, 0, dy, steps, rows, *inputs, state,
            total, *geometry.arguments(dim), segment, segments,
        )  # fmt: skip
        _pass_borders(fwd, state, total, A, exits, layout, geometry, segments, 0, segments, True)

    shape, row_shape = (geometry.batch, geometry.routes, segments), (geometry.batch, length, geometry.routes)
    dx = x.new_empty(*row_shape, dim, dtype=layout.route_dtype)
    d_rows = x.new_empty(*row_shape, layout.row_width, dtype=layout.row_dtype)
    tile_rows = A.new_empty(tiles, *d_rows.shape) if tiles > 1 else d_rows
    d_steps = d_weight = None
    if layout.fused:
        d_weight = A.new_empty(*shape, dim, layout.rank)
    else:
        d_steps = x.new_empty(*row_shape, dim, dtype=layout.row_dtype)
    dA, d_bias, dD = A.new_empty(*shape, states, dim), A.new_empty(*shape, dim), A.new_empty(*shape, dim)
    module.scan_bwd_kernel(
        geometry.sequences * segments * tiles, 32 * warps, warps * layout.bwd_warp_shared, x, steps, rows, *inputs, dy,
        borders, exits, dx, d_steps, tile_rows, d_weight, dA, d_bias, dD, geometry.pixels, *geometry.arguments(dim),
        segment, segments,
    )  # fmt: skip
    pixel_module = load("pixels.cu", layout.pixel_macros, device)
    if tiles > 1:
        count = d_rows.numel() // 4
        pixel_module.sum_tiles_kernel(_blocks(count), 256, 0, tile_rows, d_rows, count, tiles)
    grads = Gradients(
        dx, d_rows, d_steps, None if d_weight is None else x.new_empty(geometry.routes, dim, layout.rank),
        torch.empty_like(A), A.new_empty(geometry.routes, dim), A.new_empty(geometry.routes, dim),
    )  # fmt: skip
    outputs = geometry.routes * dim * (states + 2 + (layout.rank if layout.fused else 0))
    pixel_module.sum_parameters_kernel(
        -(-outputs // 32), 256, 0, dA, d_bias, dD, d_weight, grads.A, grads.dt_bias, grads.D, grads.dt_weight,
        geometry.batch, geometry.routes, segments, dim,
    )  # fmt: skip
    return grads


def pack(layout: Layout, weight: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(routes, rank + 2*states, dim) -> (routes * row width, dim), and the sum of D over the routes."""
    routes, _, dim = weight.shape
    packed = weight.new_empty(routes * layout.row_width, dim)
    skip = None if D is None else D.new_empty(dim)
    module = load("pixels.cu", layout.pixel_macros, weight.device)
    module.pack_kernel(-(-packed.numel() // 256), 256, 0, weight, packed, D, skip, packed.numel(), dim, routes)
    return packed, skip


def merge_forward(layout: Layout, y: Tensor, x: Tensor, skip: Tensor | None, routes: int, out: Tensor) -> Tensor:
    """ln 2 times the sum of y over routes, plus skip * x."""
    count = out.numel() // layout.wide
    module = load("pixels.cu", layout.pixel_macros, x.device)
    module.merge_fwd_kernel(_blocks(count), 256, 0, y, x, skip, out, count, out.shape[-1], routes)
    return out


def merge_backward(
    layout: Layout, dx: Tensor, dy: Tensor, skip: Tensor | None, extra: Tensor | None, routes: int, out: Tensor
) -> Tensor:
    """ln 2 times the sum of dx over routes, plus skip * dy, plus extra."""
    count = out.numel() // layout.wide
    module = load("pixels.cu", layout.pixel_macros, dy.device)
    module.merge_bwd_kernel(_blocks(count), 256, 0, dx, dy, skip, extra, out, count, out.shape[-1], routes)
    return out
