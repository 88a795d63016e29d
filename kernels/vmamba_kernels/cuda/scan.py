"""The launches that both operators share: a scan over sequences of pixels, forward and backward.

Everything is channels last.  A sequence is one route of one image, or one group of one sequence of the 1-D operator:
pixels (batch, length, channels), rows (batch, length, routes, row width), outputs (batch, length, routes, dim).
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..registry import BackendError
from .compiler import Module, load
from .layout import Layout

MAX_LENGTH = (1 << 31) - (1 << 10)  # positions of a route, which the kernels count in 32 bits


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


def empty_borders(x: Tensor, layout: Layout, batch: int, routes: int, length: int, save: bool) -> Tensor:
    """For the states between chunks, (batch, routes, borders, states, dim); empty unless `save`."""
    return x.new_empty(layout.borders(batch, routes, length, save), dtype=layout.border_dtype)


@dataclass
class Gradients:
    x: Tensor  # (batch, length, routes, dim) flat: a route's share, through the recurrence, divided by ln 2
    rows: Tensor  # (pixels, routes * row width); the steps' columns only if the layout is fused
    steps: Tensor | None  # (pixels, routes, dim), unless fused
    dt_weight: Tensor | None  # (routes, dim, rank), if fused
    A: Tensor  # (routes, dim, states) float32
    dt_bias: Tensor  # (routes, dim) float32
    D: Tensor  # (routes, dim) float32, of one route at every route: only their sum reaches the output


class Scan:
    """The scans of one layout and geometry.  What their launches take beside tensors is worked out once, so that a call
    is little more than allocations and launches: a small model waits for the host.  Raises BackendError for a route
    longer than the kernels count."""

    def __init__(self, layout: Layout, geometry: Geometry, device: torch.device):
        if geometry.length > MAX_LENGTH:
            raise BackendError(
                f"backend 'cuda' walks routes of up to {MAX_LENGTH:,} positions, not {geometry.length:,}; cut it, or "
                "take backend='reference'"
            )
        self.layout, self.geometry, self._device = layout, geometry, device
        self._processors, self._shared_limit = _limits(device)
        self._sizes = geometry.arguments(layout.dim)
        self._merge_sizes = geometry.pixels * layout.dim // layout.thread_channels, layout.dim, geometry.routes
        self._fwd_segment, self._fwd_segments = self._segments(layout.fwd_groups)
        self._fwd_launch = self._fwd_grid(self._fwd_segments), 32 * layout.fwd_warps, 0

    def _segments(self, warps: int) -> tuple[int, int]:
        return self.layout.segments(self.geometry.sequences, self.geometry.length, warps, self._processors)

    def _fwd_grid(self, segments: int) -> int:
        return self.geometry.sequences * segments * -(-self.layout.fwd_groups // self.layout.fwd_warps)

    # The kernels, loaded when first launched: what only infers never compiles the backward ones.

    @cached_property
    def _fwd(self) -> Module:
        return load("scan_fwd.cu", self.layout.fwd_macros, self._device)

    @cached_property
    def _bwd(self) -> Module:
        return load("scan_bwd.cu", self.layout.bwd_macros(self._bwd_warps), self._device)

    @cached_property
    def _pixels(self) -> Module:
        return load("pixels.cu", self.layout.pixel_macros, self._device)

    # Sizes of the backward pass.

    @cached_property
    def _bwd_warps(self) -> int:
        return self.layout.bwd_warps(self._shared_limit)

    @cached_property
    def _bwd_tiles(self) -> int:
        return self.layout.bwd_tiles(self._bwd_warps)

    @cached_property
    def _bwd_segments(self) -> tuple[int, int]:
        return self._segments(self._bwd_tiles * self._bwd_warps)

    @cached_property
    def _partial_sums(self) -> list[int]:
        """Where the backward kernel's partial sums lie in one allocation, in bytes: of the rows by channel tile, of
        dt_weight, A, dt_bias and D by image and segment; and the allocation's size."""
        layout, geometry = self.layout, self.geometry
        itemsize, channels = layout.row_dtype.itemsize, geometry.sequences * self._bwd_segments[1] * layout.dim
        tiles = self._bwd_tiles if self._bwd_tiles > 1 else 0
        sizes = (
            tiles * geometry.pixels * geometry.routes * layout.row_width * itemsize,
            channels * layout.rank * itemsize if layout.fused else 0, channels * layout.states * 4, channels * 4,
            channels * 4,
        )  # fmt: skip
        return list(accumulate((-(-size // 256) * 256 for size in sizes), initial=0))

    def pack(self, weight: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
        """weight (routes, rank + 2*states, dim) as (routes * row width, dim), and the sum of D over the routes,
        empty for None."""
        routes, dim = self.geometry.routes, self.layout.dim
        packed = weight.new_empty(routes * self.layout.row_width, dim)
        skip = weight.new_empty(0 if D is None else dim, dtype=torch.float32)
        count = packed.numel()
        self._pixels.pack_kernel(-(-count // 256), 256, 0, weight, packed, D, skip, count, dim, routes)
        return packed, skip

    def forward(
        self, x: Tensor, steps: Tensor | None, rows: Tensor, dt_weight: Tensor | None, dt_bias: Tensor | None,
        A: Tensor, save: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The routes' outputs (batch, length, routes, dim), flat and divided by ln 2, and the states at chunk borders
        (batch, routes, borders, states, dim), empty unless `save`."""
        layout, geometry = self.layout, self.geometry
        segment, segments = self._fwd_segment, self._fwd_segments
        y = x.new_empty(geometry.pixels * geometry.routes * layout.dim, dtype=layout.route_dtype)
        borders = empty_borders(x, layout, geometry.batch, geometry.routes, geometry.length, save)
        inputs, entries, chunk = (x, steps, rows, dt_weight, dt_bias, A), None, layout.chunk if save else 0
        if segments > 1:
            state, total = self._segment_ends(A, segments)
            self._fwd.scan_summary_kernel(*self._fwd_launch, *inputs, state, total, *self._sizes, segment, segments)
            entries = self._pass(state, total, A, segments, adjoint=False)
        self._fwd.scan_fwd_kernel(
            *self._fwd_launch, *inputs, entries, y, borders, *self._sizes, chunk, segment, segments
        )
        return y, borders

    def merge_forward(self, y: Tensor, x: Tensor, skip: Tensor) -> Tensor:
        """The output: ln 2 times the sum of y over routes, plus skip * x."""
        out = torch.empty_like(x, dtype=self.layout.out)
        self._pixels.merge_fwd_kernel(_blocks(self._merge_sizes[0]), 256, 0, y, x, skip, out, *self._merge_sizes)
        return out

    def backward(
        self, x: Tensor, steps: Tensor | None, rows: Tensor, dt_weight: Tensor | None, dt_bias: Tensor | None,
        A: Tensor, dy: Tensor, borders: Tensor,
    ) -> Gradients:  # fmt: skip
        """The gradients of `forward`, but for x's and the rows' own: see `merge_backward`."""
        layout, geometry = self.layout, self.geometry
        routes, dim, states, pixels = geometry.routes, layout.dim, layout.states, geometry.pixels
        (segment, segments), tiles, warps = self._bwd_segments, self._bwd_tiles, self._bwd_warps
        inputs = dt_weight, dt_bias, A
        exits = None
        if segments > 1:
            state, total = self._segment_ends(A, segments)
            self._fwd.scan_adjoint_kernel(
                self._fwd_grid(segments), 32 * layout.fwd_warps, 0, dy, steps, rows, *inputs, state, total,
                *self._sizes, segment, segments,
            )  # fmt: skip
            exits = self._pass(state, total, A, segments, adjoint=True)

        dx = x.new_empty(pixels * routes * dim, dtype=layout.route_dtype)
        d_rows = x.new_empty(pixels, routes * layout.row_width, dtype=layout.row_dtype)
        d_steps = None if layout.fused else x.new_empty(pixels, routes, dim, dtype=layout.row_dtype)
        *starts, size = self._partial_sums
        partial = A.new_empty(size // 4)
        address = partial.data_ptr()
        tile_rows, d_weight, dA, d_bias, dD = [address + start for start in starts]
        if not layout.fused:
            d_weight = None
        self._bwd.scan_bwd_kernel(
            geometry.sequences * segments * tiles, 32 * warps, layout.bwd_shared(warps), x, steps, rows, *inputs, dy,
            borders, exits, dx, d_steps, tile_rows if tiles > 1 else d_rows, d_weight, dA, d_bias, dD, pixels,
            *self._sizes, segment, segments,
        )  # fmt: skip
        if tiles > 1:
            count = d_rows.numel() // 4
            self._pixels.sum_tiles_kernel(_blocks(count), 256, 0, tile_rows, d_rows, count, tiles)
        grads = Gradients(
            dx, d_rows, d_steps, torch.empty_like(dt_weight) if layout.fused else None,
            torch.empty_like(A), A.new_empty(routes, dim), A.new_empty(routes, dim),
        )  # fmt: skip
        outputs = routes * dim * (states + 2 + (layout.rank if layout.fused else 0))
        self._pixels.sum_parameters_kernel(
            -(-outputs // 32), 256, 0, dA, d_bias, dD, d_weight, grads.A, grads.dt_bias, grads.D, grads.dt_weight,
            geometry.batch, routes, segments, dim,
        )  # fmt: skip
        return grads

    def merge_backward(self, dx: Tensor, dy: Tensor, skip: Tensor, extra: Tensor) -> Tensor:
        """x's gradient: ln 2 times the sum of dx over routes, plus skip * dy, plus extra."""
        out = torch.empty_like(dy, dtype=self.layout.x)
        blocks = _blocks(self._merge_sizes[0])
        self._pixels.merge_bwd_kernel(blocks, 256, 0, dx, dy, skip, extra, out, *self._merge_sizes)
        return out

    def _segment_ends(self, A: Tensor, segments: int) -> tuple[Tensor, Tensor]:
        """For the states at the segments' ends, and the sums of their steps."""
        sequences, states, dim = self.geometry.sequences, self.layout.states, self.layout.dim
        return A.new_empty(sequences, segments, states, dim), A.new_empty(sequences, segments, dim)

    def _pass(self, state: Tensor, total: Tensor, A: Tensor, segments: int, adjoint: bool) -> Tensor:
        """The states entering the segments, or (adjoint) the gradients of those leaving them; the outermost unset."""
        count, passed = self.geometry.sequences * self.layout.states * self.layout.dim, torch.empty_like(state)
        self._fwd.scan_pass_kernel(
            _blocks(count), 256, 0, state, total, A, passed, count, self.layout.dim, self.geometry.routes, segments,
            int(adjoint),
        )  # fmt: skip
        return passed
