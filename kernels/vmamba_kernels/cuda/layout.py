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
    def b0(self) -> int:
        return self.rank if self.lane_states % 4 else _round_up(self.rank, 4)

    @cached_property
    def c0(self) -> int:
        return self.b0 + self.lane_states * self.lanes

    @cached_property
    def width(self) -> int:
        return _round_up(self.c0 + self.lane_states * self.lanes, 8)

    @cached_property
    def sections(self) -> tuple[tuple[int, int], ...]:
        """(first column, columns) of the steps, B and C."""
        return (0, self.rank), (self.b0, self.states), (self.c0, self.states)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """(routes, rank + 2*states, ...) -> (routes, width, ...)."""
        if self.width == weight.shape[1]:
            return weight.contiguous()
        packed = weight.new_zeros(weight.shape[0], self.width, *weight.shape[2:])
        for (first, count), part in zip(self.sections, weight.split([s[1] for s in self.sections], 1), strict=True):
            packed[:, first : first + count] = part
        return packed

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
        return 1

    @cached_property
    def fwd_warps(self) -> int:
        return _even(self.fwd_groups, 4)

    @cached_property
    def fwd_groups(self) -> int:
        """Warps that cover the channels."""
        return -(-self.dim // (32 // self.fwd_rows.lanes * self.fwd_channels))

    @cached_property
    def fwd_macros(self) -> tuple[tuple[str, object], ...]:
        size = 4 if self.row_dtype == torch.float32 else 2
        stage = 16 if self.states == 1 else 8
        while stage > 4 and stage * self.fwd_rows.width * (2 * size + 4 * (size == 2)) > 8192:
            stage //= 2
        blocks = max(1, (24 if self.states == 1 else 16) // self.fwd_warps)
        return self._macros(self.fwd_rows, C=self.fwd_channels, K=stage, WARPS=self.fwd_warps, MIN_BLOCKS=blocks)

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
        """Steps between the states kept for the backward pass: those of 16 states take 1.3 times a bfloat16 x."""
        return min(max(16, _round_up(6 * self.states, 16)), 128)

    def bwd_shared(self, warps: int) -> int:
        """Bytes of shared memory of a block of the backward kernel."""
        rows = self.sub * self.bwd_rows.width
        if self.row_dtype == torch.bfloat16:
            rows += rows // 2  # as they were copied, beside their float32 form
        scalars = self.sub * self.bwd_warp_channels * 4
        states = (-(-self.chunk // self.sub) - 1) * self.bwd_channels * self.bwd_rows.lane_states * 32
        cells = 2 * warps * self.sub * 2 * self.bwd_rows.lane_states * self.bwd_rows.lanes
        return 4 * (cells + warps * (rows + scalars + states))

    def bwd_warps(self, shared_limit: int) -> int:
        groups = -(-self.dim // self.bwd_warp_channels)
        warps = _even(groups, 12 if self.states <= 2 else 6)
        while warps > 1 and self.bwd_shared(warps) > shared_limit:
            warps -= 1
        return warps

    def bwd_macros(self, warps: int) -> tuple[tuple[str, object], ...]:
        blocks = max(1, 12 // warps)
        return self._macros(self.bwd_rows, C=self.bwd_channels, SUB=self.sub, WARPS=warps, MIN_BLOCKS=blocks)

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
def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _even(groups: int, most: int) -> int:
    """At most `most` warps a block, so that the last block is as full as it can be."""
    return -(-groups // -(-groups // most))
