"""The Triton backend: every operator, on any GPU that Triton compiles for, with nothing to build at install."""

import torch
from triton.runtime import JITFunction

from ..registry import Call, unknown_routes
from .common import MAX_ROUTES, ROUTE_CODES, chunk_pass_kernel, why_not_on
from .scan import cross_selective_scan, selective_scan
from .ssd import cross_ssd

OPERATORS = {
    "selective_scan": selective_scan,
    "cross_selective_scan": cross_selective_scan,
    "cross_ssd": cross_ssd,
}

MAX_STATES = 64
MAX_RANK = 256
OLDEST_GPU = (8, 0)
INTERPRETED = not isinstance(chunk_pass_kernel, JITFunction)  # TRITON_INTERPRET=1 when the kernels were defined


def why_not(call: Call) -> str | None:
    """One sentence why Triton cannot serve `call`, or None."""
    if call.device.type == "cpu" and not INTERPRETED:
        return "Triton needs a GPU and the tensors are on the CPU (TRITON_INTERPRET=1 runs it there, slowly)"
    if call.device.type not in ("cpu", "cuda"):
        return f"Triton runs on GPUs of device type 'cuda', and the tensors are on '{call.device}'"
    if call.device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    if call.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(call.device)
        if capability < OLDEST_GPU:
            return "Triton supports GPUs from compute capability {}.{} on, and this one has {}.{}".format(
                *OLDEST_GPU, *capability
            )
    if torch.float64 in (call.dtype, call.out_dtype):
        return "it computes in float32; the reference computes in float64"
    if call.states > MAX_STATES:
        return f"it handles up to {MAX_STATES} states, and there are {call.states}"
    if call.rank > MAX_RANK:
        return f"it handles ranks up to {MAX_RANK}, and this one is {call.rank}"
    if unknown := unknown_routes(call, ROUTE_CODES):
        return unknown
    if len(call.routes) > MAX_ROUTES:
        return f"it handles up to {MAX_ROUTES} routes, and there are {len(call.routes)}"
    if call.device.type == "cuda" and not INTERPRETED:
        return why_not_on(torch.cuda.current_device() if call.device.index is None else call.device.index)
    return None
