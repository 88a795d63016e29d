"""The scans for a graph that another program runs (ONNX): the reference's arithmetic, each recurrence one operator.

A route stands first, (length, batch, routes, ...), and all routes are scanned at once: then a graph's loop over the
first dimension reads and writes its tensors as they lie.  Sizes may be symbols.  `torch.ops.vmamba.recurrence` and
`torch.ops.vmamba.selective_steps` are what is left to translate; here they are plain loops, without gradients.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import no_autocast
from .registry import BackendError, Call, wants_gradient


def why_not(call: Call) -> str | None:
    return None


@torch.library.custom_op("vmamba::recurrence", mutates_args=())
def recurrence(decay: Tensor, inputs: Tensor, C: Tensor, start: Tensor) -> Tensor:
    """C[l] * h[l], where h[l] = decay[l] * h[l - 1] + inputs[l], from h[-1] = start.

    Args:
        decay, inputs: (length, ...).
        C: (length, ...), which may be 1 where `inputs` is not.
        start: (...), as a step of `inputs`.

    Returns:
        (length, ...), as `inputs`.
    """
    outputs = []
    for step in range(len(inputs)):
        start = decay[step] * start + inputs[step]
        outputs.append(C[step] * start)
    return torch.stack(outputs)


@recurrence.register_fake
def _(decay: Tensor, inputs: Tensor, C: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


@torch.library.custom_op("vmamba::selective_steps", mutates_args=())
def selective_steps(delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor) -> Tensor:
    """C[l] h[l], where h[l] = exp(delta[l] * A) * h[l - 1] + inputs[l] * B[l], from h[-1] = start.

    Args:
        delta, inputs: (length, batch, routes, 1, dim).
        A: (routes, states, dim).
        B: (length, batch, routes, states, 1).
        C: (length, batch, routes, 1, states).
        start: (batch, routes, states, dim).

    Returns:
        (length, batch, routes, 1, dim).
    """
    outputs = []
    for step in range(len(delta)):
        start = (delta[step] * A).exp() * start + inputs[step] * B[step]
        outputs.append(C[step] @ start)
    return torch.stack(outputs)


@selective_steps.register_fake
def _(delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


def cross_selective_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    routes: tuple[str, ...],
    out_dtype: torch.dtype,
) -> Tensor:
    """`vmamba_kernels.cross_selective_scan`, already checked."""
    rank, states, dtype = dt_weight.shape[2], A.shape[2], A.dtype
    projected = reference.project(x, x_proj_weight, dtype)  # (batch, height, width, routes, rank + 2*states)
    dt, B, C = _walk(projected.unbind(3), routes).split((rank, states, states), dim=-1)
    u = _walk([x.to(dtype)] * len(routes), routes)
    with no_autocast(x.device.type):
        delta = torch.stack([F.linear(dt[:, :, k], dt_weight[k].to(dtype)) for k in range(len(routes))], dim=2)
        delta = softplus(delta if dt_bias is None else delta + dt_bias)  # (length, batch, routes, dim)
        y = _scan(delta, delta * u, A.transpose(1, 2), B, C)
    return reference.skip(_merge(y, *x.shape[1:3], routes), x, D, out_dtype)


def cross_ssd(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    routes: tuple[str, ...],
    chunk_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`vmamba_kernels.cross_ssd`, already checked."""
    heads, dtype = A.shape[1], A.dtype
    states = (x_proj_weight.shape[1] - heads) // 2
    projected = reference.project(x, x_proj_weight, dtype)
    delta, B, C = _walk(projected.unbind(3), routes).split((heads, states, states), dim=-1)
    delta = softplus(delta if dt_bias is None else delta + dt_bias)
    u = _walk([x.to(dtype)] * len(routes), routes).unflatten(-1, (heads, -1))
    u, delta, B, C = (t.movedim(0, 2) for t in (u, delta, B, C))  # (batch, routes, length, ...)
    with no_autocast(x.device.type):
        y = reference.ssd(u, delta, A, B, C, chunk_size, _ends).flatten(-2).movedim(2, 0)
    return reference.skip(_merge(y, *x.shape[1:3], routes), x, None if D is None else D.flatten(1), out_dtype)


def _ends(decay: Tensor, inputs: Tensor) -> Tensor:
    """From chunk to chunk, (batch, routes, chunks, heads, 1) and (batch, routes, chunks, heads, *)."""
    _check_no_gradient(decay, inputs)
    decay, inputs = decay.movedim(2, 0), inputs.movedim(2, 0)
    ends = recurrence(decay, inputs, torch.ones_like(decay), inputs.new_zeros(inputs.shape[1:]))
    return ends.movedim(0, 2)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`vmamba_kernels.selective_scan`, already checked."""
    groups, dtype = B.shape[1], A.dtype

    def by_group(t: Tensor) -> Tensor:  # (batch, groups*dim, length) -> (length, batch, groups, dim)
        return t.to(dtype).permute(2, 0, 1).unflatten(2, (groups, -1))

    delta = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias[:, None]
    delta = by_group(softplus(delta) if delta_softplus else delta)
    A, B, C = A.unflatten(0, (groups, -1)).transpose(1, 2), *(t.to(dtype).permute(3, 0, 1, 2) for t in (B, C))
    with no_autocast(u.device.type):
        y = _scan(delta, delta * by_group(u), A, B, C).flatten(2).permute(1, 2, 0)
    if D is not None:
        y = y + D[:, None] * u.to(dtype)
    return y.to(out_dtype)


def _scan(delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence from a zero state.

    With one state a channel everything but `decay * h + input` stands outside of the loop, which costs a microsecond
    an operator and step; with more states the decays of all steps would be too large for a cache, so they are made
    inside (docs/log.md).

    Args:
        delta, inputs: (length, batch, routes, dim); inputs are delta * u.
        A: (routes, states, dim).
        B, C: (length, batch, routes, states).

    Returns:
        (length, batch, routes, dim).
    """
    _check_no_gradient(delta, inputs, A, B, C)
    states = A.shape[1]
    if states == 1:
        start = inputs.new_zeros(inputs.shape[1:])
        return recurrence((delta * A.squeeze(1)).exp(), inputs * B, C, start)
    start = inputs.new_zeros((*inputs.shape[1:3], states, inputs.shape[3]))
    steps = selective_steps(delta.unsqueeze(3), inputs.unsqueeze(3), A, B.unsqueeze(4), C.unsqueeze(3), start)
    return steps.squeeze(3)


def _check_no_gradient(*tensors: Tensor) -> None:
    if wants_gradient(*tensors):
        raise BackendError("backend 'graph' has no gradients; call it inside torch.no_grad(), or choose another")


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) by operators that runtimes vectorise, as they do not their Softplus (docs/log.md).

    Of u = 1 + e rounded, log(u) * e / (u - 1) is log(1 + e) to its last digits; below -15.9, where u would be 1, the
    result stays at 1.2e-7.
    """
    e = x.clamp(-15.9, 20.0).exp()
    u = e + 1
    return torch.maximum(x, u.log() * (e / (u - 1)))


def _walk(images: Sequence[Tensor], routes: tuple[str, ...]) -> Tensor:
    """An image (batch, height, width, dim) for each route -> (length, batch, routes, dim)."""
    along = []
    for image, route in zip(images, routes, strict=True):
        image = image.permute(2, 1, 0, 3) if route.startswith("col") else image.permute(1, 2, 0, 3)
        line = image.flatten(0, 1)
        along.append(line.flip(0) if route.endswith("rev") else line)
    return torch.stack(along, dim=2)


def _merge(y: Tensor, height: int, width: int, routes: tuple[str, ...]) -> Tensor:
    """(length, batch, routes, dim) -> (batch, height, width, dim), the routes added."""
    merged = 0
    for line, route in zip(y.unbind(2), routes, strict=True):
        line = line.flip(0) if route.endswith("rev") else line
        if route.startswith("col"):
            merged = merged + line.unflatten(0, (width, height)).permute(2, 1, 0, 3)
        else:
            merged = merged + line.unflatten(0, (height, width)).permute(2, 0, 1, 3)
    return merged


OPERATORS = {
    "selective_scan": selective_scan,
    "cross_selective_scan": cross_selective_scan,
    "cross_ssd": cross_ssd,
}
