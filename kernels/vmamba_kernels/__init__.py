"""Selective-scan operators for images and sequences, one signature for every backend.

`selective_scan` is the 1-D operator, `cross_selective_scan` and `cross_ssd` take an image, project it, scan it along
several routes and merge the results; `layer_norm` norms the channels of each pixel, `add_layer_norm` those of a sum;
`depthwise_conv` convolves each channel, `gelu_mlp` is two linear layers with GELU between them.  `reference.py` is
their specification; `registry.py` says who can serve a call.
"""

from .operators import (
    ROUTES,
    add_layer_norm,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_ssd,
    depthwise_conv,
    gelu_mlp,
    layer_norm,
    selective_scan,
)
from .reference import autocast_dtype, is_plain, is_seen_into, no_autocast, wider
from .registry import BackendError, Call, Choice, backends, choice, choose, explain, why_absent

__all__ = [
    "ROUTES",
    "BackendError",
    "Call",
    "Choice",
    "add_layer_norm",
    "autocast_dtype",
    "backends",
    "choice",
    "choose",
    "cross_merge",
    "cross_scan",
    "cross_selective_scan",
    "cross_ssd",
    "depthwise_conv",
    "explain",
    "gelu_mlp",
    "is_plain",
    "is_seen_into",
    "layer_norm",
    "no_autocast",
    "selective_scan",
    "why_absent",
    "wider",
]
