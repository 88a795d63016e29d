"""How a call is laid out on the GPU: macros, lanes, chunks, segments.  The same arithmetic as in common.cuh."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_STATES = 64
MAX_RANK = 128
MAX_ROUTES = 31  # two bits each in one 64-bit argument


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Rows:
    """Columns of a pixel's projected row: the steps' numbers at 0, B at b0, C at c0, `width` in all, zeros between."""

    states: int
    rank: int
    lanes: int  # that share a channel

    @cached_property
    def lane_states(self) -> int:
        return -(-self.states // self.lanes)

    @cached_property
    def padded_states(self) -> int:
        return self.lane_states * self.lanes

    @cached_property
    def b0(self) -> int:
        return self.rank if self.lane_states % 4 else _round_up(self.rank, 4)

    @cached_property
    def c0(self) -> int:
        return self.b0 + self.padded_states

    @cached_property
    def width(self) -> int:
        return _round_up(self.c0 + self.padded_states, 8)

    @cached_property
    def sections(self) -> tuple[tuple[int, int], ...]:
        """(first column, columns) of the steps, B and C."""
        return (0, self.rank), (self.b0, self.states), (self.c0, self.states)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """(routes, rank + 2*states, ...) -> (routes, width, ...)."""
        if self.width == weight.shape[1]:
            return weight.contiguous()
        ends = [first for first, _ in self.sections[1:]] + [self.width]
        parts = weight.split([count for _, count in self.sections], 1)
        padded = []
        for (first, count), end, part in zip(self.sections, ends, parts, strict=True):
            padded.append(part)
            if end > first + count:
                padded.append(weight.new_zeros(weight.shape[0], end - first - count, *weight.shape[2:]))
        return torch.cat(padded, 1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`."""
        if self.width == self.rank + 2 * self.states:
            return packed
        return torch.cat([packed[:, first : first + count] for first, count in self.sections], 1)


@dataclass(frozen=True)
class Layout:
    """What the kernels are specialised on, and the sizes that follow from it."""

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

    def _macros(self, rows: Rows, **more: object) -> tuple[tuple[str, object], ...]:
        return (
            ("N", self.states),
            ("R", self.rank),
            ("S", rows.lanes),
            ("X", TYPES[self.x]),
            ("P", TYPES[self.row_dtype]),
            ("Y", TYPES[self.route_dtype]),
            ("G", TYPES[self.out]),
            ("SOFTPLUS", int(self.softplus)),
            *more.items(),
        )

    # Forward: a lane holds up to 16 states of one channel, or of two where there is little to hold.

    @cached_property
    def fwd_rows(self) -> Rows:
        return Rows(self.states, self.rank, _power_of_two(-(-self.states // 16)))

    @cached_property
    def fwd_channels(self) -> int:
        """Two where whole warps and the registers allow it: what a pixel costs besides its states is then shared."""
        return 2 if self.dim % 64 == 0 and (self.states == 1 or 0 < self.rank <= 12) else 1

    @cached_property
    def fwd_groups(self) -> int:
        """Warps that cover the channels."""
        return -(-self.dim // (32 // self.fwd_rows.lanes * self.fwd_channels))

    @cached_property
    def fwd_stage(self) -> int:
        return 16 if self.states == 1 else 8

    @cached_property
    def fwd_warps(self) -> int:
        warp = self.fwd_stage * (self.fwd_rows.width * 8 + (32 // self.fwd_rows.lanes * self.fwd_channels + 8) * 4)
        return _even(self.fwd_groups, min(4, 40960 // warp))  # of the 48 KB that a block has without asking

    @cached_property
    def fwd_macros(self) -> tuple[tuple[str, object], ...]:
        return self._macros(
            self.fwd_rows, C=self.fwd_channels, K=self.fwd_stage, WARPS=self.fwd_warps, MIN_BLOCKS=self.fwd_blocks
        )

    @cached_property
    def fwd_blocks(self) -> int:
        """Blocks of a multiprocessor that registers are left for."""
        return (12 if self.fwd_channels == 2 or self.states == 1 else 16) // self.fwd_warps

    # Backward: a lane holds up to 4 states of two channels, and the states of `sub` steps of them.

    @cached_property
    def bwd_rows(self) -> Rows:
        return Rows(self.states, self.rank, _power_of_two(-(-self.states // 4)))

    @cached_property
    def bwd_channels(self) -> int:
        return 2 if self.bwd_rows.lanes > 1 else 1

    @cached_property
    def bwd_warp_channels(self) -> int:
        return 32 // self.bwd_rows.lanes * self.bwd_channels

    @cached_property
    def sub(self) -> int:
        return 16 if self.bwd_rows.lane_states * self.bwd_channels <= 2 else 8

    @cached_property
    def chunk(self) -> int:
        """Steps between the states kept for the backward pass: those of 16 states take 1.4 times a bfloat16 x."""
        return min(max(16, 11 * self.states // 2 // 8 * 8), 128)

    @cached_property
    def fused(self) -> bool:
        """Whether the backward kernel itself forms the gradients of the step projection."""
        return self.row_dtype == torch.bfloat16 and self.rank > 0

    def bwd_shared(self, warps: int) -> int:
        """Bytes of shared memory of a block of the backward kernel, as its constants add up."""
        rows, channels, converted = self.bwd_rows, self.bwd_warp_channels, 2 * self.bwd_rows.padded_states
        own = 2 * self.sub * rows.width * self.row_dtype.itemsize
        packed = self.x == self.out == torch.bfloat16
        own += self.sub * (channels if channels < 16 else channels + 8) * (12 if packed else 20)
        if self.row_dtype == torch.bfloat16:
            own += self.sub * 4 * (2 if converted == 2 else _round_up(converted, 4))
        own += self.sub * rows.width * 4
        if self.fused:
            tile, depth = max(channels, 8), -(-self.rank // 8)
            own += self.sub * (tile + 8) * 2 + tile // 8 * depth * 128 + -(-channels // 16) * depth * 512
        own += (self.chunk // self.sub - 1) * self.bwd_channels * rows.lane_states * 128
        return warps * own

    @cache  # noqa: B019 - layouts are few and live as long as the process
    def bwd_warps(self, shared_limit: int) -> int:
        """Warps a block, for the most channels in flight on a multiprocessor of `shared_limit` bytes."""
        groups = -(-self.dim // self.bwd_warp_channels)

        in_flight = {}
        for warps in range(1, 13):
            blocks = min(12 // warps, shared_limit // (self.bwd_shared(warps) + 3072))
            in_flight[warps] = blocks * groups / -(-groups // warps)
        enough = 0.93 * max(in_flight.values())
        return max(warps for warps in in_flight if in_flight[warps] >= enough)  # the fewer blocks add up their sums

    @cache  # noqa: B019
    def bwd_macros(self, warps: int) -> tuple[tuple[str, object], ...]:
        return self._macros(
            self.bwd_rows, C=self.bwd_channels, SUB=self.sub, CHUNK=self.chunk, 
            EVEN=int(self.dim % 2 == 0), TILED=int(self.bwd_tiles(warps) > 1),
            WARPS=warps, MIN_BLOCKS=self.bwd_blocks(warps),
        )  # fmt: skip

    def bwd_tiles(self, warps: int) -> int:
        return -(-self.dim // (warps * self.bwd_warp_channels))

    def bwd_blocks(self, warps: int) -> int:
        return max(1, 12 // warps)

    # Pixel kernels.

    @cached_property
    def wide(self) -> int:
        """Channels a thread of the merging kernel takes."""
        return next(w for w in (8, 4, 2, 1) if self.dim % w == 0)

    @cached_property
    def pixel_macros(self) -> tuple[tuple[str, object], ...]:
        return self._macros(self.bwd_rows, WIDE=self.wide)

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


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _even(groups: int, most: int) -> int:
    """At most `most` warps a block, so that the last block is as full as it can be."""
    return -(-groups // -(-groups // most))
