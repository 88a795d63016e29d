"""The state that a scan starts from and the one it ends with, as positions before and behind the sequence.

So every backend has them, and their gradients: a scan is not told what its positions mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps so short that nothing decays over them, and 1 over that; powers of 2, so that products with them are exact.
_STEPS = {torch.float32: 2.0**-60, torch.float64: 2.0**-400}


def extended(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, with_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, delta, A, B and C of a scan that is longer by one position for each state that goes in and for each that comes
    out, in the dtype of A and with steps that no softplus changes any more.

    Before the sequence position n puts state n in: u is what has to go in, the step is very short, and B, which reads u
    into that state alone, makes up for the step.  Behind the sequence the step is 0, so nothing moves, and where C
    reads state n alone the output is that state.

    Args:
        u, delta: (batch, channels, length).
        A: (channels, states).
        B, C: (batch, groups, states, length).
        initial_state: (batch, channels, states), or None; what is not finite counts as 0, since the zeros of B would
            not keep it out of the other states.
        with_last: whether the state at the end is read.
    """
    batch, groups, states, _ = B.shape
    u, B, C = u.to(A.dtype), B.to(A.dtype), C.to(A.dtype)
    one_each = torch.eye(states, dtype=A.dtype, device=A.device).expand(batch, groups, states, states)
    if initial_state is not None:
        step = _STEPS[A.dtype]
        u = torch.cat((initial_state.to(A.dtype).nan_to_num(0, 0, 0), u), -1)
        delta = F.pad(delta, (states, 0), value=step)
        B, C = torch.cat((one_each / step, B), -1), F.pad(C, (states, 0))
    if with_last:
        u, delta, B = (F.pad(t, (0, states)) for t in (u, delta, B))
        C = torch.cat((C, one_each), -1)
    return u, delta, A, B, C
