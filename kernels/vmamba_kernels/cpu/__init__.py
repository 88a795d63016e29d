"""The CPU backend: loops in Python that numba compiles when they first run, with nothing to build at install."""

import torch

from ..registry import Call, unknown_routes

try:
    from .scan import KINDS, cross_selective_scan, selective_scan, step_sizes
except Exception as error:  # also those of a numba that is broken, or of other packages than it wants
    raise ImportError(f"{error}; pip install --upgrade numba") from error

OPERATORS = {
    "cross_selective_scan": cross_selective_scan,
    "selective_scan": selective_scan,
    "step_sizes": step_sizes,  # PyTorch's softplus has other last bits where its threads meet
}

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(call: Call) -> str | None:
    """One sentence why this backend cannot serve the call, or None."""
    if call.device.type != "cpu":
        return f"the tensors are on {call.device}, not on the CPU"
    for dtype in (call.dtype, call.out_dtype):
        if dtype not in TYPES:
            return f"it computes in float32, and {str(dtype).removeprefix('torch.')} is computed by the reference"
    if call.states < 1:
        return "there are no states"
    if call.operator == "cross_selective_scan" and call.rank < 1:
        return "the step projection has rank 0"
    return unknown_routes(call, KINDS)
