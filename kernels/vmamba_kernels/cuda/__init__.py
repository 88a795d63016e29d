"""The scans in CUDA C++, compiled at run time by NVRTC: nothing to build, and a new GPU works by itself."""

import torch

from ..registry import Call, unknown_routes
from .compiler import why_not_on
from .cross_selective_scan import KINDS, cross_selective_scan
from .depthwise_conv import SIDE, depthwise_conv
from .layer_norm import MAX_DIM, add_layer_norm, layer_norm
from .layout import MAX_RANK, MAX_ROUTES, MAX_STATES, TYPES
from .mlp import gelu_mlp
from .selective_scan import selective_scan

OPERATORS = {
    "cross_selective_scan": cross_selective_scan,
    "selective_scan": selective_scan,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "depthwise_conv": depthwise_conv,
    "gelu_mlp": gelu_mlp,
}


def why_not(call: Call) -> str | None:
    """One sentence why this backend cannot serve the call, or None."""
    if call.device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {call.device}, not on an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    for dtype in (call.dtype, call.out_dtype):
        if dtype not in TYPES:
            return f"{str(dtype).removeprefix('torch.')} is not among its types (float32, bfloat16, float16)"
    if call.operator in ("layer_norm", "add_layer_norm"):
        if call.dim > MAX_DIM:
            return f"it norms up to {MAX_DIM} channels, not {call.dim}"
    elif call.operator == "depthwise_conv":
        if call.side != SIDE:
            return f"it convolves windows of {SIDE} x {SIDE}, not {call.side} x {call.side}"
    elif call.operator != "gelu_mlp" and not 1 <= call.states <= MAX_STATES:
        return f"it holds 1 to {MAX_STATES} states, not {call.states}"
    if call.operator == "cross_selective_scan" and not 1 <= call.rank <= MAX_RANK:
        return f"it takes step projections of rank 1 to {MAX_RANK}, not {call.rank}"
    if unknown := unknown_routes(call, KINDS):
        return unknown
    if len(call.routes) > MAX_ROUTES:
        return f"it takes at most {MAX_ROUTES} routes, not {len(call.routes)}"
    index = torch.cuda.current_device() if call.device.index is None else call.device.index
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"it needs a GPU of compute capability 8.0 or newer (bfloat16, asynchronous copies), not {major}.{minor}"
    return why_not_on(torch.device("cuda", index))
