"""How a call is laid out on the GPU: what its kernels are compiled with, and the sizes that follow.

The kernels get their sizes from here, as macros in capitals, and the offsets of the backward kernel's shared memory;
the C++ files count none of them again.  The words of both:

    step          a position of a route; also a channel's number there, s = delta / ln 2
    stage         steps whose pixels and rows are read ahead together, 8 or 16; backward, 16
    chunk         steps between the states that the forward pass keeps for the backward pass, 16 to 48: whole stages
    border        the states between two chunks
    sub-chunk     steps of the backward pass whose sums are finished together: a stage, or half of it
    part          steps of the backward pass whose states lie in registers at once; those between parts are kept in
                  shared memory.  A sub-chunk is one part or two
    segment       whole chunks of a route, where a route is cut up to fill the GPU
    walk          one segment of one route of one image, which a warp goes along for its channels

    row           what a pixel is projected to for a route: the numbers of the step, B, C, zeros up to 16 bytes
    cell          an element of a row's gradient, of one warp's channels; a block adds its warps' cells
    piece         bytes of a pixel that can be read at once
    slot          room in shared memory for the copies of a stage's rows and pixels: one for each stage of a chunk, and
                  at least two
    place         room for what is made of a stage, B and C as float32 and the steps: one for each stage of a chunk
    channel tile  the channels of a block of the backward kernel

    lane          of a warp.  STATE_LANES of them share a channel and have its states between them (`state_lane` says
                  which); 32 / STATE_LANES have different channels (`channel_lane`), CHANNELS_A_LANE neighbours each
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import torch

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_STATES = 64
MAX_RANK = 128
STAGE = 16  # of the backward kernel
MAX_ROUTES = 31  # two bits each in one 64-bit argument

Macros = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Layout:
    """What the kernels are specialised on, and what follows from it."""

    states: int
    rank: int  # 0: the steps themselves are given
    dim: int
    x: torch.dtype
    out: torch.dtype
    softplus: bool = True

    @cached_property
    def row_dtype(self) -> torch.dtype:
        """Of projected rows and gradients inside: float16 would overflow where float32 does not."""
        return torch.bfloat16 if self.x == torch.bfloat16 else torch.float32

    @cached_property
    def route_dtype(self) -> torch.dtype:
        """Of one route's output, before the routes are added."""
        return torch.bfloat16 if self.x == self.out == torch.bfloat16 else torch.float32

    @cached_property
    def border_dtype(self) -> torch.dtype:
        """Of the states kept between chunks for the backward pass."""
        return torch.bfloat16 if self.x.itemsize == 2 else torch.float32

    def borders(self, batch: int, routes: int, length: int, save: bool) -> tuple[int, ...]:
        """The shape of the states kept between chunks, if any.  The arguments may be symbols."""
        return (batch, routes, (length + self.chunk - 1) // self.chunk - 1, self.states, self.dim) if save else (0,)

    def _macros(self, state_lanes: int, **more: object) -> Macros:
        """What all kernels of the scans are compiled with, and `more`."""
        return (
            ("STATES", self.states),
            ("RANK", self.rank),  # of the step projection; 0: the steps themselves are given
            ("STATE_LANES", state_lanes),
            ("PADDED_STATES", self.padded_states),  # columns of a row for B, and as many for C
            ("B_COLUMN", self.b_column),  # where B starts; C follows
            ("ROW_WIDTH", self.row_width),
            ("SOFTPLUS", int(self.softplus)),  # whether the step goes through it
            ("PixelT", TYPES[self.x]),  # type of pixels, of given steps and of the projections' weights
            ("RowT", TYPES[self.row_dtype]),
            ("RouteT", TYPES[self.route_dtype]),
            ("OutT", TYPES[self.out]),  # of the output and its gradient
            ("BorderT", TYPES[self.border_dtype]),
            *more.items(),
        )

    # A pixel's row, by column: the numbers of the steps at 0, B at b_column, C after it; zeros between, so that it can
    # be read 16 bytes at a time.

    @cached_property
    def padded_states(self) -> int:
        return max(self.fwd_lanes * -(-self.states // self.fwd_lanes), self.bwd_lanes * self.bwd_lane_states)

    @cached_property
    def b_column(self) -> int:
        return self.rank if self.padded_states % 4 else _round_up(self.rank, 4)

    @cached_property
    def row_width(self) -> int:
        return _round_up(self.b_column + 2 * self.padded_states, 8)

    def sections(self, rows: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """The columns, along `dim`, of the steps, B and C."""
        starts = (0, self.rank), (self.b_column, self.states), (self.b_column + self.padded_states, self.states)
        return [rows.narrow(dim, start, count) for start, count in starts]

    # Forward: a lane holds up to 16 states of a channel.

    @cached_property
    def fwd_lanes(self) -> int:
        """Lanes of a warp that share a channel."""
        return _power_of_two(-(-self.states // 16))

    @cached_property
    def fwd_channels(self) -> int:
        """Channels of a lane: two where whole warps and the registers allow it, to share what a pixel costs."""
        return 2 if self.dim % 64 == 0 and (self.states == 1 or 0 < self.rank <= 12) else 1

    @cached_property
    def fwd_groups(self) -> int:
        """Warps that cover the channels."""
        return -(-self.dim // (32 // self.fwd_lanes * self.fwd_channels))

    @cached_property
    def fwd_stage(self) -> int:
        """Steps read ahead."""
        return 16 if self.states == 1 else 8

    @cached_property
    def _fwd_widths(self) -> dict[str, int]:
        """Of the rows of a warp's shared memory, in floats."""
        both = 2 if self.padded_states == 1 else _round_up(2 * self.padded_states, 4)
        return dict(
            STEPS_WIDTH=32 // self.fwd_lanes * self.fwd_channels + 8,  # spreads the rows over the banks
            FLOATS_WIDTH=both if self.row_dtype == torch.bfloat16 else self.row_width,  # B and C as float32
        )

    @cached_property
    def fwd_warps(self) -> int:
        warp = self.fwd_stage * (self.row_width * 8 + self._fwd_widths["STEPS_WIDTH"] * 4)  # bytes, at most
        most = min(4, 40960 // warp)  # of the 48 KB that a block has without asking
        return -(-self.fwd_groups // -(-self.fwd_groups // most))

    @cached_property
    def fwd_macros(self) -> Macros:
        warps = 12 if self.fwd_channels == 2 or self.states == 1 else 16  # of a multiprocessor, by registers
        return self._macros(
            self.fwd_lanes, CHANNELS_A_LANE=self.fwd_channels, STAGE=self.fwd_stage, WARPS_A_BLOCK=self.fwd_warps,
            MIN_BLOCKS=max(1, warps // self.fwd_warps),  # a multiprocessor
            **self._fwd_widths,
        )  # fmt: skip

    # Backward: with few states a lane has a channel, otherwise eight lanes share one or two.

    @cached_property
    def bwd_lanes(self) -> int:
        return 1 if self.states <= 4 else 8

    @cached_property
    def bwd_lane_states(self) -> int:
        """States of one channel that a lane holds."""
        return -(-self.states // self.bwd_lanes)

    @cached_property
    def bwd_channels(self) -> int:
        return 2 if self.bwd_lanes > 1 and self.bwd_lane_states <= 4 else 1

    @cached_property
    def bwd_warp_channels(self) -> int:
        return 32 // self.bwd_lanes * self.bwd_channels

    @cached_property
    def sub_chunk(self) -> int:
        return STAGE if self.states <= 2 else 8

    @cached_property
    def matrix_sums(self) -> bool:
        """Whether the backward kernel sums by matrix instructions from where the states lie."""
        return self.bwd_lanes == 8 and self.row_dtype == torch.bfloat16

    @cached_property
    def part(self) -> int:
        return 4 if self.matrix_sums else self.sub_chunk

    @cached_property
    def chunk(self) -> int:
        """At 16 states those kept take 1.33 times x."""
        return min(max(STAGE, (3 * self.states + 7) // STAGE * STAGE), 48)

    @cached_property
    def slots(self) -> int:
        return max(self.chunk // STAGE, 2)

    @cached_property
    def fused(self) -> bool:
        """Whether the backward kernel itself forms the gradients of the step projection, as matrix products of tiles of
        steps' gradients; otherwise it writes the steps' gradients out."""
        return self.row_dtype == torch.bfloat16 and self.rank > 0

    @cached_property
    def piece(self) -> int:
        size = self.dim * min(self.x.itemsize, self.out.itemsize)
        return next(bytes for bytes in (16, 8, 4, 2) if size % bytes == 0)

    # Its dynamic shared memory: what a block shares, then what each of its warps has.  A width is that of one row of a
    # region, in elements, with what spreads the rows over the banks.

    @cached_property
    def _bwd_widths(self) -> dict[str, int]:
        channels, states = self.bwd_warp_channels, self.bwd_lane_states
        tile_rows, lane_states = max(channels, 8), self.bwd_channels * states

        def pixels(dtype: torch.dtype) -> int:
            return channels if channels < 32 else channels + 16 // dtype.itemsize

        return dict(
            BC_WIDTH=2 if states == 1 else _round_up(2 * states, 4),  # floats of a lane's B and C
            X_WIDTH=pixels(self.x),
            DY_WIDTH=pixels(self.out),
            STEPS_WIDTH=channels if channels < 32 else channels + 8,
            TILE_ROWS=tile_rows,  # channels of a tile of steps' gradients
            TILE_WIDTH=tile_rows + 8,
            RANK_TILES=-(-self.rank // 8) if self.fused else 0,  # matrices that cover the columns of dt_weight
            WEIGHT_TILES=-(-channels // 16),  # and its rows
            WEIGHT_WORDS=2 if channels < 16 else 4,  # floats of a lane in each
            STATE_WORDS=-(-lane_states // 2) if self.matrix_sums else lane_states,  # kept as bfloat16 or float32
        )  # fmt: skip

    @cached_property
    def _bwd_block_regions(self) -> dict[str, int]:
        """Name -> bytes, in their order."""
        return dict(
            ROWS=self.slots * STAGE * self.row_width * self.row_dtype.itemsize,  # [slots][STAGE][ROW_WIDTH]
            BC=self.chunk * self.bwd_lanes * self._bwd_widths["BC_WIDTH"] * 4,  # [places][STAGE][STATE_LANES][BC_WIDTH]
        )

    @cached_property
    def _bwd_warp_regions(self) -> dict[str, int]:
        """Name -> bytes, in their order."""
        slots, chunk, width = self.slots, self.chunk, self._bwd_widths
        weight_sums = width["WEIGHT_TILES"] * width["RANK_TILES"] * 32 * width["WEIGHT_WORDS"]
        x = slots * STAGE * width["X_WIDTH"] * self.x.itemsize
        return dict(
            X=x,  # [slots][STAGE][X_WIDTH]
            DY=slots * STAGE * width["DY_WIDTH"] * self.out.itemsize,  # [slots][STAGE][DY_WIDTH]
            GIVEN=0 if self.rank else x,  # of steps that are given
            STEPS=chunk * width["STEPS_WIDTH"] * 8,  # [places][STAGE][STEPS_WIDTH] of s and s x
            CELLS=STAGE * self.row_width * self.row_dtype.itemsize,  # [STAGE][ROW_WIDTH]
            TILE=STAGE * width["TILE_WIDTH"] * 2 if self.fused else 0,  # [STAGE][TILE_WIDTH] bfloat16
            WEIGHT_SUMS=weight_sums * 4,  # [WEIGHT_TILES][RANK_TILES][lane][WEIGHT_WORDS]
            KEPT=chunk // self.part * width["STATE_WORDS"] * 128 if chunk > self.sub_chunk else 0,  # by part and lane
        )

    @cached_property
    def bwd_warps_by_registers(self) -> int:
        """Warps that a multiprocessor can hold: with 128 registers a thread, or with 168."""
        return 16 if self.bwd_lanes > 1 and self.bwd_channels * self.bwd_lane_states <= 4 else 12

    @cache  # noqa: B019 - layouts are few and live as long as the process
    def bwd_warps(self, shared_limit: int) -> int:
        """Warps a block.  `shared_limit`: bytes of shared memory that a block can have.

        Nearly the most channels in flight on a multiprocessor; then the most in a block, whose sums over channels need
        fewer partial ones, up to four, from where the block's barriers cost more than that.
        """
        groups, registers = -(-self.dim // self.bwd_warp_channels), self.bwd_warps_by_registers
        in_flight = {}
        for warps in range(1, 5):
            block = self.bwd_shared(warps) + 1024  # the system's part
            in_flight[warps] = min(registers // warps, (shared_limit + 1024) // block) * groups / -(-groups // warps)
        enough = 0.93 * max(in_flight.values())
        return max(warps for warps, channels in in_flight.items() if channels >= enough)

    def bwd_shared(self, warps: int) -> int:
        """Bytes of dynamic shared memory of a block of `warps`."""
        return sum(self._bwd_block_regions.values()) + warps * sum(self._bwd_warp_regions.values())

    def bwd_tiles(self, warps: int) -> int:
        """Blocks that cover the channels."""
        return -(-self.dim // (warps * self.bwd_warp_channels))

    @cache  # noqa: B019
    def bwd_macros(self, warps: int) -> Macros:
        return self._macros(
            self.bwd_lanes, CHANNELS_A_LANE=self.bwd_channels, WARPS_A_BLOCK=warps,
            MIN_BLOCKS=max(1, self.bwd_warps_by_registers // warps),  # a multiprocessor
            STAGE=STAGE, CHUNK=self.chunk, SUB_CHUNK=self.sub_chunk, PART=self.part, PIECE=self.piece,
            MATRIX_SUMS=int(self.matrix_sums), FUSED_PROJECTION=int(self.fused), **self._bwd_widths,
            **_offsets("BLOCK_SHARED", self._bwd_block_regions), **_offsets("WARP_SHARED", self._bwd_warp_regions),
        )  # fmt: skip

    # Pixel kernels.

    @cached_property
    def thread_channels(self) -> int:
        """Channels that a thread of the merging kernels takes."""
        return next(count for count in (8, 4, 2, 1) if self.dim % count == 0)

    @cached_property
    def pixel_macros(self) -> Macros:
        return self._macros(1, CHANNELS_A_THREAD=self.thread_channels)

    def segments(self, sequences: int, length: int, warps: int, processors: int) -> tuple[int, int]:
        """(steps a segment, segments): one, unless `sequences` * `warps` leave the GPU empty."""
        chunks = -(-length // self.chunk)
        busy = sequences * warps
        if busy >= 6 * processors:
            return chunks * self.chunk, 1
        each = -(-chunks // min(chunks, -(-16 * processors // busy)))
        return each * self.chunk, -(-chunks // each)


def side_by_side(groups: int) -> int:
    """Threads of a block along the channels, read in so many groups: 16 to 32 that leave none idle, if any do."""
    return next((lanes for lanes in range(32, 15, -1) if groups % lanes == 0), min(32, groups))


@cache
def layout(states: int, rank: int, dim: int, x: torch.dtype, out: torch.dtype, softplus: bool = True) -> Layout:
    """The one Layout object of these values: what it has computed is kept."""
    return Layout(states, rank, dim, x, out, softplus)


def _offsets(total: str, regions: dict[str, int]) -> dict[str, int]:
    """Region -> bytes, as NAME_AT, where each starts in floats, and the sum of all as `total`."""
    starts = accumulate((bytes // 4 for bytes in regions.values()), initial=0)
    return dict(zip([*(f"{name}_AT" for name in regions), total], starts, strict=True))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
