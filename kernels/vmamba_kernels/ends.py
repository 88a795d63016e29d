"""The state that a scan starts from and the one it ends with, as positions before and behind the sequence.

So every backend has them, and their gradients: a scan is not told what its positions mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP = 2.0**-24  # so short that hardly anything decays over it; a power of 2, so that products with it are exact


def extended(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, with_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, delta, A, B and C of a scan that is longer by one position for each state that goes in and for each that comes
    out, in the dtype of A and with steps that no softplus changes any more.

    Before the sequence position n puts state n in: B reads u into that state alone, and u is what has to go in, divided
    by a very short step and by what the state loses in the short steps until the sequence starts.  Behind it the step
    is 0, so nothing moves, and where C reads state n alone the output is that state.

    Args:
        u, delta: (batch, channels, length).
        A: (channels, states).
        B, C: (batch, groups, states, length).
        initial_state: (batch, channels, states), or None.
        with_last: whether the state at the end is read.
    """
    batch, groups, states, _ = B.shape
    u, B, C = u.to(A.dtype), B.to(A.dtype), C.to(A.dtype)
    one_each = torch.eye(states, dtype=A.dtype, device=A.device).expand(batch, groups, states, states)
    if initial_state is not None:
        waits = torch.arange(states - 1, -1, -1, dtype=A.dtype, device=A.device)  # short steps after a state's own
        goes_in = initial_state.to(A.dtype) * torch.exp(-_STEP * waits * A) / _STEP
        u, delta = torch.cat((goes_in, u), -1), F.pad(delta, (states, 0), value=_STEP)
        B, C = torch.cat((one_each, B), -1), F.pad(C, (states, 0))
    if with_last:
        u, delta, B = (F.pad(t, (0, states)) for t in (u, delta, B))
        C = torch.cat((C, one_each), -1)
    return u, delta, A, B, C
