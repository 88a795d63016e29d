"""What the operators cost, whichever backend runs them, for PyTorch's FlopCounterMode (two operations a multiply-add).

The recurrence of one route is counted as its authors count it, 9*B*L*D*N, and the skip as B*L*D.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]
SSD_CHUNK = 64


def selective_scan(u: Shape, delta: Shape, A: Shape, *_: object, **__: object) -> int:
    """Operations for u (batch, groups*dim, length), A (groups*dim, states)."""
    return 2 * prod(u) * (9 * A[1] + 1)


def cross_selective_scan(
    x: Shape, x_proj_weight: Shape, dt_weight: Shape, dt_bias: Shape, A: Shape, *_: object, **__: object
) -> int:
    """Operations for x (batch, height, width, dim), x_proj_weight (routes, rank + 2*states, dim),
    dt_weight (routes, dim, rank), A (routes, dim, states): two projections, the recurrence, the skip."""
    routes, projected, _ = x_proj_weight
    return 2 * prod(x) * routes * (projected + dt_weight[2] + 9 * A[2] + 1)


def cross_ssd(x: Shape, x_proj_weight: Shape, dt_bias: Shape, A: Shape, *_: object, **__: object) -> int:
    """Operations for x (batch, height, width, dim), x_proj_weight (routes, heads + 2*states, dim), A (routes, heads).

    A position costs the projection, its share of C B^T inside a chunk of 64 (chunk*states) and of that matrix times
    the channels (chunk*dim), of the chunk's state and of reading it (2*states*dim), and the skip.
    """
    batch, height, width, dim = x
    routes, projected, _ = x_proj_weight
    states = (projected - A[1]) // 2
    position = projected * dim + SSD_CHUNK * (states + dim) + 2 * states * dim + dim
    return 2 * batch * height * width * routes * position


def depthwise_conv(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    """Operations for x (batch, height, width, dim), weight (dim, 1, side, side)."""
    return 2 * prod(x) * prod(weight[1:])


def gelu_mlp(x: Shape, weight1: Shape, bias1: Shape, weight2: Shape, *_: object, **__: object) -> int:
    """Operations for x (..., dim), weight1 (hidden, dim), weight2 (out, hidden)."""
    return 2 * prod(x[:-1]) * (prod(weight1) + prod(weight2))


def register(backend: str) -> None:
    """Tell FlopCounterMode the cost of the custom operators of `backend`."""
    for formula in (selective_scan, cross_selective_scan, cross_ssd, depthwise_conv, gelu_mlp):
        operator = getattr(torch.ops.vmamba, f"{formula.__name__}_{backend}", None)
        if operator is not None:
            register_flop_formula(operator)(formula)
