"""The operators in plain PyTorch: any device, any dtype, differentiable by autograd.  Everything else is tested
against this file, so it says what the operators are; it is also what runs on a CPU.

A scan takes about 2*sqrt(length) steps: routes are cut into about sqrt(length) chunks that are scanned side by side.
Inside, what belongs to a position is laid out as (groups, steps, batch, chunks, *), so that a step is one slice.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTES = ("row", "col", "row_rev", "col_rev")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast in force, None without one and on devices that have none (meta)."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def no_autocast(device_type: str) -> AbstractContextManager:
    """Inside it, autocast changes nothing."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


def why_not(call: object) -> str | None:
    """Nothing is beyond the reference."""
    return None


def cross_scan(x: Tensor, routes: tuple[str, ...]) -> Tensor:
    """(batch, height, width, dim) -> (batch, routes, length, dim)."""
    return torch.stack([_along(x, route) for route in routes], dim=1)


def cross_merge(y: Tensor, height: int, width: int, routes: tuple[str, ...]) -> Tensor:
    """(batch, routes, length, dim) -> (batch, height, width, dim), the routes added."""
    return sum(_back(y[:, k], height, width, route) for k, route in enumerate(routes))


def _along(x: Tensor, route: str) -> Tensor:
    if route.startswith("col"):
        x = x.transpose(1, 2)
    x = x.flatten(1, 2)  # (batch, length, dim)
    return x.flip(1) if route.endswith("rev") else x


def _back(y: Tensor, height: int, width: int, route: str) -> Tensor:
    if route.endswith("rev"):
        y = y.flip(1)
    if route.startswith("col"):
        return y.unflatten(1, (width, height)).transpose(1, 2)
    return y.unflatten(1, (height, width))


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
    groups, length, dtype = B.shape[1], u.shape[2], A.dtype

    def by_position(t: Tensor) -> Tensor:  # (batch, groups, *, length) -> (groups, steps, batch, chunks, *)
        return torch.stack([_cut(group.transpose(1, 2)) for group in t.to(dtype).unbind(1)])

    def by_group(t: Tensor) -> Tensor:  # (batch, groups*dim, length) -> (batch, groups, dim, length)
        return t.unflatten(1, (groups, -1))

    if delta_bias is not None:
        delta = delta.to(dtype) + delta_bias[:, None]
    delta = by_position(by_group(delta))
    if delta_softplus:
        delta = F.softplus(delta)
    y = _scan(by_position(by_group(u)), delta, A.unflatten(0, (groups, -1)), by_position(B), by_position(C))
    y = _uncut(y, length).transpose(2, 3).flatten(1, 2)  # (batch, groups*dim, length)
    if D is not None:
        y = y + D[:, None] * u.to(dtype)
    return y.to(out_dtype)


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
    height, width = x.shape[1:3]
    u = torch.stack([_cut(_along(x, route)) for route in routes])  # (routes, steps, batch, chunks, dim)
    positions = u.shape[1:4]
    projected = torch.bmm(u.flatten(1, 3), x_proj_weight.transpose(1, 2)).to(dtype)
    dt, B, C = projected.split((rank, states, states), dim=-1)  # (routes, steps*batch*chunks, *)
    with no_autocast(x.device.type):
        dt_weight = dt_weight.to(dtype).transpose(1, 2)
        # delta: (routes, steps*batch*chunks, dim)
        delta = torch.bmm(dt, dt_weight) if dt_bias is None else torch.baddbmm(dt_bias[:, None], dt, dt_weight)
    delta, B, C = (t.unflatten(1, positions) for t in (F.softplus(delta), B, C))
    y = _uncut(_scan(u.to(dtype), delta, A, B, C), height * width)
    return _merge(y, x, D, height, width, routes, out_dtype)


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
    height, width = x.shape[1:3]
    u = cross_scan(x, routes)  # (batch, routes, length, dim)
    projected = (u @ x_proj_weight.transpose(1, 2)).to(dtype)  # (batch, routes, length, heads + 2*states)
    delta, B, C = projected.split((heads, states, states), dim=-1)
    if dt_bias is not None:
        delta = delta + dt_bias[:, None]
    with no_autocast(x.device.type):
        y = _ssd(u.to(dtype).unflatten(-1, (heads, -1)), F.softplus(delta), A, B, C, chunk_size)
    return _merge(y.flatten(-2), x, None if D is None else D.flatten(1), height, width, routes, out_dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """`vmamba_kernels.layer_norm`, already checked."""
    with no_autocast(x.device.type):
        return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(out_dtype)


def _merge(
    y: Tensor, x: Tensor, D: Tensor | None, height: int, width: int, routes: tuple[str, ...], out_dtype: torch.dtype
) -> Tensor:
    """Add the routes and the skip; only the sum of D over the routes reaches the output."""
    merged = cross_merge(y, height, width, routes)
    if D is not None:
        merged = torch.addcmul(merged, x.to(D.dtype), D.sum(0))
    return merged.to(out_dtype)


def _cut(t: Tensor) -> Tensor:
    """(batch, length, *) -> (steps, batch, chunks, *); step s of chunk c is position c*steps + s, then zeros."""
    length = t.shape[1]
    steps = math.ceil(math.sqrt(length))
    chunks = math.ceil(length / steps)
    if chunks * steps > length:
        t = F.pad(t, (0, 0, 0, chunks * steps - length))
    return t.unflatten(1, (chunks, steps)).movedim(2, 0)


def _uncut(y: Tensor, length: int) -> Tensor:
    """(groups, steps, batch, chunks, dim) -> (batch, groups, length, dim)."""
    return y.permute(2, 0, 3, 1, 4).flatten(2, 3)[:, :, :length]


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence from a zero state.

    First every chunk is scanned from zero, all side by side; then the state is carried from chunk to chunk; then each
    position adds what the state at its chunk's start still contributes, which needs no further steps.  What stands
    behind the end of a route changes nothing before it.

    Args:
        u, delta: (groups, steps, batch, chunks, dim).
        A: (groups, dim, states).
        B, C: (groups, steps, batch, chunks, states).

    Returns:
        (groups, steps, batch, chunks, dim).
    """
    steps, chunks = u.shape[1], u.shape[3]
    A = A.transpose(1, 2)[:, None, None, None]  # (groups, 1, 1, 1, states, dim)
    in_place = not torch.is_grad_enabled()
    u = u.mul_(delta) if in_place else delta * u
    # What has a states axis is computed for a few steps at a time, so that it stays in the cache and what is freed is
    # used again: without the bound a forward pass of vmamba_tiny_s1l8 takes a tenth longer.
    several = max(1, min(steps // A.shape[-2], 2**18 // max(1, u[:, 0].numel() * A.shape[-2])))
    runs = [slice(start, start + several) for start in range(0, steps, several)]
    state, since_start = None, None  # of each chunk, and the decay from its start: (groups, batch, chunks, states, dim)
    local, decays = [], []
    for run in runs:
        decay = (delta[:, run].unsqueeze(-2) * A).exp_()  # (groups, several, batch, chunks, states, dim)
        inputs = u[:, run].unsqueeze(-2) * B[:, run].unsqueeze(-1)
        states, products = [], []
        for decay_of_step, input_of_step in zip(decay.unbind(1), inputs.unbind(1), strict=True):
            if state is None:
                state, since_start = input_of_step, decay_of_step
            elif in_place:
                state, since_start = input_of_step.addcmul_(decay_of_step, state), decay_of_step.mul_(since_start)
            else:
                state, since_start = torch.addcmul(input_of_step, decay_of_step, state), decay_of_step * since_start
            states.append(state)
            products.append(since_start)
        local.append(inputs if in_place else torch.stack(states, dim=1))
        decays.append(decay if in_place else torch.stack(products, dim=1))

    starts = [torch.zeros_like(state[:, :, 0])]
    for chunk in range(chunks - 1):
        starts.append(torch.addcmul(state[:, :, chunk], since_start[:, :, chunk], starts[-1]))
    start = torch.stack(starts, dim=2).unsqueeze(1)  # (groups, 1, batch, chunks, states, dim)
    y = [
        _read(C[:, run], from_zero.addcmul_(decay, start) if in_place else torch.addcmul(from_zero, decay, start))
        for run, from_zero, decay in zip(runs, local, decays, strict=True)
    ]
    return torch.cat(y, dim=1) if len(y) > 1 else y[0]


def _read(C: Tensor, h: Tensor) -> Tensor:
    """sum_n C[n] * h[n, d]: C (..., states), h (..., states, dim) -> (..., dim)."""
    if C.shape[-1] == 1:
        return h.squeeze(-2).mul_(C) if not torch.is_grad_enabled() else C * h.squeeze(-2)
    return (C.unsqueeze(-1) * h).sum(-2)


def _ssd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """The recurrence with one decay a head, from a zero state: a masked matrix product inside each chunk.

    Args:
        u: (batch, routes, length, heads, dim).  delta: (batch, routes, length, heads).  A: (routes, heads).
        B, C: (batch, routes, length, states).

    Returns:
        (batch, routes, length, heads, dim).
    """
    length = u.shape[2]
    if u.numel() == 0:
        return u * ((delta * A.unsqueeze(1)) * (B * C).sum(-1, keepdim=True)).unsqueeze(-1)
    size = min(chunk_size, length)
    chunks = math.ceil(length / size)

    def chunked(t: Tensor) -> Tensor:  # (batch, routes, length, *) -> (batch, routes, chunks, size, *), zeros behind
        behind = t.new_zeros(*t.shape[:2], chunks * size - length, *t.shape[3:])
        return torch.cat((t, behind), dim=2).unflatten(2, (chunks, size))

    w, exponent = chunked(delta.unsqueeze(-1) * u), chunked(delta * A.unsqueeze(1))
    B, C = chunked(B), chunked(C)
    exponent = exponent.movedim(-1, 3)  # (batch, routes, chunks, heads, size)
    # decay[i, j] = exp(exponent[j+1] + ... + exponent[i]), summed term by term: a difference of two running sums
    # would lose the digits of a short span behind a long one.
    lower = torch.ones(size, size, dtype=torch.bool, device=u.device).tril()
    terms = exponent.unsqueeze(-1).expand(*exponent.shape, size).masked_fill(~lower.tril(-1), 0)
    decay = terms.cumsum(-2).exp().masked_fill(~lower, 0)  # (batch, routes, chunks, heads, size, size)
    y = torch.einsum("bkcin,bkcjn,bkchij,bkcjhd->bkcihd", C, B, decay, w)

    state_of_chunk = torch.einsum("bkcjn,bkchj,bkcjhd->bkchnd", B, decay[..., -1, :], w)
    decay_from_start = exponent.cumsum(-1).exp()  # (batch, routes, chunks, heads, size)
    state = torch.zeros_like(state_of_chunk[:, :, 0])
    starts = [state]
    for c in range(chunks - 1):
        state = decay_from_start[:, :, c, :, -1, None, None] * state + state_of_chunk[:, :, c]
        starts.append(state)
    y = y + torch.einsum("bkcin,bkchi,bkchnd->bkcihd", C, decay_from_start, torch.stack(starts, dim=2))
    return y.flatten(2, 3)[:, :, :length]


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "selective_scan": selective_scan,
    "cross_selective_scan": cross_selective_scan,
    "cross_ssd": cross_ssd,
    "layer_norm": layer_norm,
}
