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
        return self.height, self.width, dim, self.routes, self.kinds, self.pixel_stride, self.route_stride


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
    x: Tensor  # (batch, length, routes, dim): a route's share, through the recurrence
    steps: Tensor  # (batch, length, routes, dim)
    tile_sums: Tensor  # (tiles, batch, length, routes, cells): of B and C, to be summed over channel tiles
    A: Tensor  # (routes, states, dim) float32
    dt_bias: Tensor  # (routes, dim) float32
    D: Tensor  # (routes, dim) float32


def backward(
    layout: Layout, geometry: Geometry, x: Tensor, steps: Tensor | None, rows: tuple[Tensor, Tensor],
    dt_weight: Tensor | None, dt_bias: Tensor | None, A: Tensor, dy: Tensor, borders: Tensor,
) -> Gradients:  # fmt: skip
    """The gradients of `forward`'s output times ln 2, plus D x; `rows` as packed for forward and for backward."""
    device, length, dim, states = x.device, geometry.length, layout.dim, layout.states
    processors, shared_limit = _limits(device)
    warps = layout.bwd_warps(shared_limit)
    tiles = -(-dim // (warps * layout.bwd_warp_channels))
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
            geometry.sequences * segments * blocks, 32 * layout.fwd_warps, 0, dy, steps, rows[0], *inputs, state,
            total, *geometry.arguments(dim), segment, segments,
        )  # fmt: skip
        _pass_borders(fwd, state, total, A, exits, layout, geometry, segments, 0, segments, True)

    shape = geometry.batch, length, geometry.routes
    cells = 2 * layout.bwd_rows.lane_states * layout.bwd_rows.lanes
    dx = x.new_empty(*shape, dim, dtype=layout.route_dtype)
    d_steps = x.new_empty(*shape, dim, dtype=layout.row_dtype)
    tile_sums = A.new_empty(tiles, *shape, cells)
    dA = A.new_empty(geometry.batch, geometry.routes, segments, states, dim)
    d_bias = A.new_empty(geometry.batch, geometry.routes, segments, dim)
    dD = torch.empty_like(d_bias)
    module.scan_bwd_kernel(
        geometry.sequences * segments * tiles, 32 * warps, layout.bwd_shared(warps), x, steps, rows[1], *inputs, dy,
        borders, exits, dx, d_steps, tile_sums, dA, d_bias, dD, geometry.pixels, *geometry.arguments(dim),
        segment, segments,
    )  # fmt: skip
    return Gradients(dx, d_steps, tile_sums, dA.sum((0, 2)), d_bias.sum((0, 2)), dD.sum((0, 2)))


def gather_rows(layout: Layout, tile_sums: Tensor, d_rows: Tensor) -> None:
    """Write the columns of B and C, and zeros, into the rows' gradient (..., row width), all but the first `rank`."""
    tiles, pixel_routes = tile_sums.shape[0], tile_sums[0, ..., 0].numel()
    count = pixel_routes * (layout.bwd_rows.width - layout.rank)
    load("pixels.cu", layout.pixel_macros, d_rows.device).gather_rows_kernel(
        _blocks(count), 256, 0, tile_sums, d_rows, count, pixel_routes, tiles
    )


def merge_forward(layout: Layout, y: Tensor, x: Tensor, skip: Tensor | None, routes: int, out: Tensor) -> Tensor:
    """ln 2 times the sum of y over routes, plus skip * x."""
    count = out.numel() // layout.wide
    module = load("pixels.cu", layout.pixel_macros, x.device)
    module.merge_fwd_kernel(_blocks(count), 256, 0, y, x, skip, out, count, out.shape[-1], routes)
    return out


def merge_backward(
    layout: Layout, dx: Tensor, dy: Tensor, skip: Tensor | None, extra: Tensor | None, routes: int, out: Tensor
) -> Tensor:
    """The sum of dx over routes, plus skip * dy, plus extra."""
    count = out.numel() // layout.wide
    module = load("pixels.cu", layout.pixel_macros, dy.device)
    module.merge_bwd_kernel(_blocks(count), 256, 0, dx, dy, skip, extra, out, count, out.shape[-1], routes)
    return out
