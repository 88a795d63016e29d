"""A kernel that does nothing but exp2, to measure the rate that bounds the scans of many states."""

import triton
import triton.language as tl

VALUES = 1024  # of a program


@triton.jit
def exp2_kernel(out, steps, VALUES: tl.constexpr):
    x = tl.arange(0, VALUES).to(tl.float32)
    for _ in range(steps):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * VALUES + tl.arange(0, VALUES), x)


def launch(out, programs: int, steps: int) -> int:
    """Start programs * VALUES * steps exponentials, and return that number; out holds programs * VALUES floats."""
    exp2_kernel[(programs,)](out, steps, VALUES=VALUES, num_warps=4)
    return programs * VALUES * steps
