"""How a call is laid out on the GPU: macros, lanes, chunks, segments; sizes as the .cu files' constants add up."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_STATES = 64
MAX_RANK = 128
STAGE = 16  # steps that a block of the backward kernel prepares at once
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

    def _macros(self, lanes: int, **more: object) -> Macros:
        return (
            ("N", self.states),
            ("R", self.rank),
            ("S", lanes),
            ("NP", self.padded_states),
            ("B0", self.b0),
            ("ROW", self.row_width),
            ("X", TYPES[self.x]),
            ("P", TYPES[self.row_dtype]),
            ("Y", TYPES[self.route_dtype]),
            ("G", TYPES[self.out]),
            ("BORDER", TYPES[self.border_dtype]),
            ("SOFTPLUS", int(self.softplus)),
            *more.items(),
        )

    # A pixel's projected row, by column: the numbers of the steps at 0, B at b0, C after it; zeros between, so that it
    # can be read 16 bytes at a time.

    @cached_property
    def padded_states(self) -> int:
        return max(self.fwd_lanes * -(-self.states // self.fwd_lanes), self.bwd_lanes * self.bwd_lane_states)

    @cached_property
    def b0(self) -> int:
        return self.rank if self.padded_states % 4 else _round_up(self.rank, 4)

    @cached_property
    def row_width(self) -> int:
        return _round_up(self.b0 + 2 * self.padded_states, 8)

    def sections(self, rows: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """The columns, along `dim`, of the steps, B and C."""
        starts = (0, self.rank), (self.b0, self.states), (self.b0 + self.padded_states, self.states)
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
    def fwd_warps(self) -> int:
        warp = self.fwd_stage * (self.row_width * 8 + (32 // self.fwd_lanes * self.fwd_channels + 8) * 4)
        most = min(4, 40960 // warp)  # of the 48 KB that a block has without asking
        return -(-self.fwd_groups // -(-self.fwd_groups // most))

    @cached_property
    def fwd_macros(self) -> Macros:
        warps = 12 if self.fwd_channels == 2 or self.states == 1 else 16  # of a multiprocessor, by registers
        return self._macros(
            self.fwd_lanes, C=self.fwd_channels, K=self.fwd_stage, WARPS=self.fwd_warps,
            MIN_BLOCKS=max(1, warps // self.fwd_warps),
        )  # fmt: skip

    # Backward: with few states a lane has a channel, otherwise eight lanes share one or two; they hold the states of
    # `part` steps and make the sums of `sub` steps.

    @cached_property
    def bwd_lanes(self) -> int:
        return 1 if self.states <= 4 else 8

    @cached_property
    def bwd_lane_states(self) -> int:
        return -(-self.states // self.bwd_lanes)

    @cached_property
    def bwd_channels(self) -> int:
        return 2 if self.bwd_lanes > 1 and self.bwd_lane_states <= 4 else 1

    @cached_property
    def bwd_warp_channels(self) -> int:
        return 32 // self.bwd_lanes * self.bwd_channels

    @cached_property
    def sub(self) -> int:
        return STAGE if self.states <= 2 else 8

    @cached_property
    def direct(self) -> bool:
        """Whether the backward kernel sums by matrix instructions from where the states lie."""
        return self.bwd_lanes == 8 and self.row_dtype == torch.bfloat16

    @cached_property
    def part(self) -> int:
        """Steps between states that the backward kernel keeps in shared memory."""
        return 4 if self.direct else self.sub

    @cached_property
    def chunk(self) -> int:
        """Steps between the states kept for the backward pass; those of 16 states take 1.33 times x."""
        return min(max(STAGE, (3 * self.states + 7) // STAGE * STAGE), 48)

    @cached_property
    def slots(self) -> int:
        """Stages whose pixels and rows shared memory holds: of a chunk, and at least the one being fetched."""
        return max(self.chunk // STAGE, 2)

    @cached_property
    def fused(self) -> bool:
        """Whether the backward kernel itself forms the gradients of the step projection."""
        return self.row_dtype == torch.bfloat16 and self.rank > 0

    @cached_property
    def bwd_block_shared(self) -> int:
        """Bytes of dynamic shared memory of a block, beside its warps'."""
        states = 2 if self.bwd_lane_states == 1 else _round_up(2 * self.bwd_lane_states, 4)
        rows = self.slots * STAGE * self.row_width * self.row_dtype.itemsize
        return rows + self.chunk * self.bwd_lanes * states * 4

    @cached_property
    def bwd_warp_shared(self) -> int:
        """Bytes of dynamic shared memory of a warp."""
        channels = self.bwd_warp_channels
        pixels = [self.x, self.out] if self.rank else [self.x, self.out, self.x]
        copied = self.slots * STAGE * sum(channels * t.itemsize + (16 if channels == 32 else 0) for t in pixels)
        steps = copied + self.chunk * (channels if channels < 32 else channels + 8) * 8
        cells = STAGE * self.row_width * self.row_dtype.itemsize
        pairs = self.bwd_channels * self.bwd_lane_states
        words = -(-pairs // 2) if self.direct else pairs  # bfloat16 or float32
        states = self.chunk // self.part * words * 128 if self.chunk > self.sub else 0
        projection = 0
        if self.fused:
            tile, depth, kept = max(channels, 8), -(-self.rank // 8), 2 if channels < 16 else 4
            projection = STAGE * (tile + 8) * 2 + depth * -(-channels // 16) * kept * 128
        return steps + cells + states + projection

    @cached_property
    def piece(self) -> int:
        """Bytes of a pixel that can be read at once."""
        size = self.dim * min(self.x.itemsize, self.out.itemsize)
        return next(bytes for bytes in (16, 8, 4, 2) if size % bytes == 0)

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
        return self.bwd_block_shared + warps * self.bwd_warp_shared

    def bwd_tiles(self, warps: int) -> int:
        """Blocks that cover the channels."""
        return -(-self.dim // (warps * self.bwd_warp_channels))

    @cache  # noqa: B019
    def bwd_macros(self, warps: int) -> Macros:
        return self._macros(
            self.bwd_lanes, C=self.bwd_channels, PART=self.part, SUB=self.sub, CHUNK=self.chunk, PIECE=self.piece,
            WARPS=warps, MIN_BLOCKS=max(1, self.bwd_warps_by_registers // warps), BLOCK_SHARED=self.bwd_block_shared,
            WARP_SHARED=self.bwd_warp_shared,
        )  # fmt: skip

    # Pixel kernels.

    @cached_property
    def wide(self) -> int:
        """Channels that a thread of the merging kernels takes."""
        return next(w for w in (8, 4, 2, 1) if self.dim % w == 0)

    @cached_property
    def pixel_macros(self) -> Macros:
        return self._macros(1, WIDE=self.wide)

    def segments(self, sequences: int, length: int, warps: int, processors: int) -> tuple[int, int]:
        """(steps a segment, segments): one, unless `sequences` * `warps` leave the GPU empty."""
        chunks = -(-length // self.chunk)
        busy = sequences * warps
        if busy >= 6 * processors:
            return chunks * self.chunk, 1
        each = -(-chunks // min(chunks, -(-16 * processors // busy)))
        return each * self.chunk, -(-chunks // each)


@cache
def layout(states: int, rank: int, dim: int, x: torch.dtype, out: torch.dtype, softplus: bool = True) -> Layout:
    """The one Layout object of these values: what it has computed is kept."""
    return Layout(states, rank, dim, x, out, softplus)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
