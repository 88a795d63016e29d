"""The operators in plain PyTorch: any device, any dtype, differentiable by autograd.  Everything else is tested
against this file, so it says what the operators are; it is also what runs on a CPU where numba is not installed.

A scan is a few dozen steps, however long the route: chunks of 7 to 16 positions are scanned side by side, then chunks
of their ends.  Large images are scanned in pieces, and without gradients memory is used again where it can be: on a
CPU, fresh memory costs as much as arithmetic.  Where a call is recorded or transformed (`is_plain`) no memory is used
again, and the pieces do not depend on the number of images, which a recorded graph may take other values of; where
the sides of an image are symbols (torch.export), there are no pieces, and a scan has a fixed number of steps.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .private import is_exporting, is_transformed, promise

ROUTES = ("row", "col", "row_rev", "col_rev")
_ROUNDS = 16  # of doubling: enough for chunks of 16 positions of 1024 x 1024


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast in force, None without one and on devices that have none (meta)."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def wider(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """What PyTorch promotes two floats to.  Its own function ends up in what PyTorch 2.6's torch.export records, which
    then cannot be loaded."""
    if one == other:
        return one
    return torch.float64 if torch.float64 in (one, other) else torch.float32


def no_autocast(device_type: str) -> AbstractContextManager:
    """Inside it, autocast changes nothing."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


def is_plain() -> bool:
    """Whether calls are run as they are: not recorded by a trace, an export or a compilation, and not changed by
    torch.func or forward-mode AD."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed())


def is_seen_into() -> bool:
    """Whether what is called must be PyTorch's own operators: under torch.func and forward-mode AD, which know no
    others, and in what torch.jit.trace, torch.export and torch.onnx record, which then runs where this package is not.
    """
    return is_exporting() if torch.compiler.is_compiling() else torch.jit.is_tracing() or is_transformed()


def why_not(call: object) -> str | None:
    """Nothing is beyond the reference."""
    return None


def cross_scan(x: Tensor, routes: tuple[str, ...]) -> Tensor:
    """(batch, height, width, dim) -> (batch, routes, length, dim)."""
    return _walk(x.unsqueeze(3), routes)


def cross_merge(y: Tensor, height: int, width: int, routes: tuple[str, ...]) -> Tensor:
    """(batch, routes, length, dim) -> (batch, height, width, dim), the routes added."""
    forwards, backwards = [], []
    for route, along in zip(routes, y.unbind(1), strict=True):
        lines = (width, height) if route.startswith("col") else (height, width)
        image = along.unflatten(1, lines)
        image = image.transpose(1, 2) if route.startswith("col") else image
        (backwards if route.endswith("rev") else forwards).append(image)
    if backwards:
        forwards.append(reduce(torch.add, backwards).flip(1, 2))
    return reduce(torch.add, forwards)


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

    def by_group(t: Tensor) -> Tensor:  # (batch, groups*dim, length) -> (batch, groups, length, dim)
        return t.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3)

    delta = step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    B, C = B.to(dtype).transpose(2, 3), C.to(dtype).transpose(2, 3)
    with no_autocast(u.device.type):
        delta = by_group(delta).clone(memory_format=torch.contiguous_format)
        y = _scan(by_group(u) * delta, delta, A.unflatten(0, (groups, -1)), B, C, is_plain())
    y = y.transpose(2, 3).flatten(1, 2)  # (batch, groups*dim, length)
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
    plain = is_plain()
    projected = project(x, x_proj_weight, dtype)
    # Large routes are walked a few at a time, in memory that is used again.
    several = min(len(routes), _share(2**21, _elements(x, plain) * states, len(routes)))
    merged = []
    for start in range(0, len(routes), several):
        some = slice(start, start + several)
        u = cross_scan(x, routes[some]).to(dtype)  # (batch, routes, length, dim)
        dt, B, C = _walk(projected[..., some, :], routes[some]).split((rank, states, states), dim=-1)
        with no_autocast(x.device.type):
            delta = dt @ dt_weight[some].to(dtype).transpose(1, 2)
            if dt_bias is not None:
                delta = delta.add_(dt_bias[some, None]) if plain else delta + dt_bias[some, None]
            delta = F.softplus(delta, out=delta) if _overwrites(plain) else F.softplus(delta)
            y = _scan(_times(u, delta, plain), delta, A[some], B, C, plain)
        merged.append(cross_merge(y, height, width, routes[some]))
    return skip(reduce(torch.add, merged), x, D, out_dtype)


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
    projected = _walk(project(x, x_proj_weight, dtype), routes)  # (batch, routes, length, heads + 2*states)
    delta, B, C = projected.split((heads, states, states), dim=-1)
    if dt_bias is not None:
        delta = delta + dt_bias[:, None]
    with no_autocast(x.device.type):
        y = ssd(u.to(dtype).unflatten(-1, (heads, -1)), F.softplus(delta), A, B, C, chunk_size)
    merged = cross_merge(y.flatten(-2), height, width, routes)
    return skip(merged, x, None if D is None else D.flatten(1), out_dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """`vmamba_kernels.layer_norm`, already checked."""
    with no_autocast(x.device.type):
        return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(out_dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`vmamba_kernels.add_layer_norm`, already checked."""
    if factor is not None:
        branch = branch * factor.view(-1, *[1] * (branch.dim() - 1))
    total = x + branch
    return total, layer_norm(total, weight, bias, eps, out_dtype)


def step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """What a scan makes of delta (batch, channels, length), in its dtype."""
    if bias is not None:
        delta = delta + bias[:, None]
    return F.softplus(delta) if softplus else delta


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, keep: bool) -> Tensor:
    """`vmamba_kernels.depthwise_conv`, already checked; autograd keeps what it needs by itself."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    with no_autocast(x.device.type):
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding="same", groups=x.shape[3])
        return (F.silu(out) if silu else out).permute(0, 2, 3, 1)


def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool) -> Tensor:
    """`vmamba_kernels.gelu_mlp`, already checked; autograd keeps what it needs by itself."""
    with no_autocast(x.device.type):
        hidden = F.linear(x, weight1, bias1)
        hidden = F.gelu(hidden) if keep else torch.ops.aten.gelu_(hidden)  # into memory that is there already
        return F.linear(hidden, weight2, bias2)


def project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (batch, height, width, dim) by weight (routes, rows, dim) -> (batch, height, width, routes, rows)."""
    return F.linear(x, weight.flatten(0, 1)).to(dtype).unflatten(-1, (weight.shape[0], -1))


def _walk(x: Tensor, routes: tuple[str, ...]) -> Tensor:
    """(batch, height, width, routes, dim) -> (batch, routes, length, dim): each route along its own image, or all along
    the one image of (batch, height, width, 1, dim)."""
    of_each = (-1, -1, -1, len(routes), -1)
    images = x.expand(of_each).unbind(3)
    if any(route.endswith("rev") for route in routes):
        flipped = x.flip(1, 2).expand(of_each).unbind(3)  # backwards along an image is forwards along the flipped one
    along = []
    for k, route in enumerate(routes):
        image = flipped[k] if route.endswith("rev") else images[k]
        along.append((image.transpose(1, 2) if route.startswith("col") else image).flatten(1, 2))
    return torch.stack(along, dim=1)


def skip(merged: Tensor, x: Tensor, D: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Add the skip to the merged routes; only the sum of D over the routes reaches the output."""
    if D is not None:
        merged = torch.addcmul(merged, x.to(D.dtype), D.sum(0))
    return merged.to(out_dtype)


def _overwrites(plain: bool) -> bool:
    """Whether memory may be used again: nothing needs what was in it."""
    return plain and not torch.is_grad_enabled()


def _elements(t: Tensor, plain: bool) -> int:
    """Of t (batch, ...); of one image where the call is recorded or transformed."""
    return t.numel() if plain else math.prod(t.shape[1:])


def _share(memory: int, elements: int, most: int) -> int:
    """How many times `elements` fit into `memory`, at least once; `most` where their number is a symbol."""
    return most if isinstance(elements, torch.SymInt) else max(1, memory // max(1, elements))


def _scan(inputs: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, plain: bool) -> Tensor:
    """The recurrence from a zero state.  Plain and without gradients it overwrites `inputs` and `delta`.

    Args:
        inputs: delta * u, (batch, groups, length, dim).
        delta: (batch, groups, length, dim).
        A: (groups, dim, states).
        B, C: (batch, groups, length, states).

    Returns:
        (batch, groups, length, dim).
    """
    dim, states = A.shape[1:]
    channels = _share(3 * 2**20 * dim, _elements(delta, plain) * states, dim)
    if channels < dim and states > 1 and A.device.type == "cpu":
        # A few at a time: memory of 12 MB is used again, of more than 32 MB it is new in every call.
        pieces = -(-dim // channels)
        parts = zip(inputs.chunk(pieces, -1), delta.chunk(pieces, -1), A.chunk(pieces, 1), strict=True)
        return torch.cat([_scan(*part, B, C, plain) for part in parts], dim=-1)
    A = math.log2(math.e) * A.transpose(1, 2).unsqueeze(1)  # (groups, 1, states, dim); powers of 2 are faster
    decay = _exp2(_times(delta.unsqueeze(-2), A, plain))  # (batch, groups, length, states, dim)
    h = _states(decay, _times(inputs.unsqueeze(-2), B.unsqueeze(-1), plain), _overwrites(plain))
    if states == 1:
        return _times(h.squeeze(-2), C, plain)
    return (C.unsqueeze(-2) @ h).squeeze(-2)


def _exp2(x: Tensor) -> Tensor:
    """2 to the power of x, in its memory."""
    return (math.log(2) * x).exp() if torch.onnx.is_in_onnx_export() else x.exp2_()  # ONNX has no exp2


def _times(a: Tensor, b: Tensor, plain: bool) -> Tensor:
    """a * b; plain and without gradients in the memory of `a`, if it is as large as the product."""
    if not _overwrites(plain):
        return a * b
    fits = b.dim() <= a.dim() and all(n in (1, m) for n, m in zip(reversed(b.shape), reversed(a.shape), strict=False))
    return a.mul_(b) if fits else a * b


def _states(decay: Tensor, inputs: Tensor, in_place: bool) -> Tensor:
    """h[l] = decay[l] * h[l - 1] + inputs[l] from zero, over dimension 2.

    A long route is cut into chunks.  First every chunk is scanned from zero, all side by side; then the states at the
    ends of the chunks are found the same way; then each position adds what the state at its chunk's start still
    contributes, which needs no further steps.

    Args:
        decay, inputs: (batch, groups, length, states, dim); decay's last two may be 1.
        in_place: overwrite both.

    Returns:
        (batch, groups, length, states, dim).
    """
    addcmul, mul = (Tensor.addcmul_, Tensor.mul_) if in_place else (torch.addcmul, torch.mul)
    length = inputs.shape[2]
    known = not isinstance(length, torch.SymInt)
    if known and length <= 16:
        states = [inputs.new_zeros(())]
        for decay_of_step, input_of_step in zip(decay.unbind(2), inputs.unbind(2), strict=True):
            states.append(addcmul(input_of_step, decay_of_step, states[-1]))
        return inputs if in_place else torch.stack(states[1:], dim=2)

    steps = max([divisor for divisor in range(7, 17) if known and length % divisor == 0], default=16)
    chunks = _chunks(length, steps)
    if not known:  # by an index, whose shape is known: torch.export would want proven that chunks divide a length
        at = torch.arange(chunks, device=inputs.device)[:, None] * steps + torch.arange(steps, device=inputs.device)
        at = at.clamp(max=length - 1)  # what stands behind the end changes nothing before it
        decay, inputs = decay[:, :, at], inputs[:, :, at]
    else:
        if length % steps:
            decay, inputs = (F.pad(t, (0, 0, 0, 0, 0, chunks * steps - length)) for t in (decay, inputs))
        decay, inputs = decay.unflatten(2, (chunks, steps)), inputs.unflatten(2, (chunks, steps))
    states, since_start = list(inputs.unbind(3)), list(decay.unbind(3))  # of each step, for all chunks
    for step in range(1, steps):
        states[step] = addcmul(states[step], since_start[step], states[step - 1])
        since_start[step] = mul(since_start[step], since_start[step - 1])
    h, decay = (inputs, decay) if in_place else (torch.stack(states, dim=3), torch.stack(since_start, dim=3))
    if known:
        ends = _states(since_start[-1].clone(), states[-1].clone(), in_place)
    else:
        ends = _by_doubling(since_start[-1], states[-1])
    h = addcmul(h, decay, _later(ends, 1).unsqueeze(3))
    return _up_to(h.flatten(2, 3), length)


def _chunks(length: int | torch.SymInt, size: int) -> int | torch.SymInt:
    """How many chunks hold so many positions; one or two more where their number is a symbol, so never a single one,
    which torch.export takes for a constant."""
    return length // size + 2 if isinstance(length, torch.SymInt) else -(-length // size)


def _up_to(x: Tensor, length: int | torch.SymInt) -> Tensor:
    """The first positions, over dimension 2: a copy where their number is a symbol, since what a view of them can be
    reshaped to would depend on it."""
    if isinstance(length, torch.SymInt):
        return x.index_select(2, torch.arange(length, device=x.device))
    return x.narrow(2, 0, length)


def _by_doubling(decay: Tensor, states: Tensor) -> Tensor:
    """`_states` of a length that is a symbol: after k rounds a position has what the 2**k positions up to it put in."""
    promise(states.shape[2] <= 2**_ROUNDS + 2)  # the last two hold nothing
    for k in range(_ROUNDS):
        states = torch.addcmul(states, decay, _later(states, 2**k))
        decay = decay * _later(decay, 2**k)
    return states


def _later(x: Tensor, positions: int) -> Tensor:
    """x[l - positions] at l, over dimension 2, zero where there is none."""
    length = x.shape[2]
    if not isinstance(length, torch.SymInt):
        return F.pad(x, (0, 0) * (x.dim() - 3) + (positions, 0)).narrow(2, 0, length)
    source = torch.arange(length, device=x.device) - positions  # there may be far fewer than `positions`
    there = (source >= 0).view(-1, *[1] * (x.dim() - 3))
    return torch.where(there, x.index_select(2, source.clamp(min=0)), x.new_zeros(()))


def _ends(decay: Tensor, inputs: Tensor) -> Tensor:
    """From chunk to chunk, (batch, routes, chunks, heads, 1) and (batch, routes, chunks, heads, *)."""
    known = not isinstance(inputs.shape[2], torch.SymInt)
    return _states(decay, inputs, in_place=False) if known else _by_doubling(decay, inputs)


def ssd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    recurrence: Callable[[Tensor, Tensor], Tensor] = _ends,
) -> Tensor:
    """The recurrence with one decay a head, from a zero state: a masked matrix product inside each chunk.

    Args:
        u: (batch, routes, length, heads, dim).  delta: (batch, routes, length, heads).  A: (routes, heads).
        B, C: (batch, routes, length, states).
        recurrence: from chunk to chunk, as `_states`.

    Returns:
        (batch, routes, length, heads, dim).
    """
    length = u.shape[2]
    known = not isinstance(length, torch.SymInt)
    if known and u.numel() == 0:
        return u * ((delta * A.unsqueeze(1)) * (B * C).sum(-1, keepdim=True)).unsqueeze(-1)
    size = min(chunk_size, length) if known else chunk_size
    chunks = _chunks(length, size)

    def chunked(t: Tensor) -> Tensor:  # (batch, routes, length, *) -> (batch, routes, chunks, size, *), zeros behind
        behind = (0, 0) * (t.dim() - 3) + (0, chunks * size - length)
        return F.pad(t, behind).unflatten(2, (chunks, size))

    w, exponent = chunked(delta.unsqueeze(-1) * u), chunked(delta * A.unsqueeze(1))
    w, exponent = w.transpose(3, 4), exponent.transpose(3, 4)  # (batch, routes, chunks, heads, size, dim and none)
    B, C = chunked(B), chunked(C)
    # decay[i, j] = exp(exponent[j+1] + ... + exponent[i]), summed term by term: a difference of two running sums
    # would lose the digits of a short span behind a long one.
    lower, zero = torch.ones(size, size, dtype=torch.bool, device=u.device).tril(), exponent.new_zeros(())
    terms = torch.where(lower.tril(-1), exponent.unsqueeze(-1), zero)
    decay = torch.where(lower, terms.cumsum(-2).exp(), zero)  # (batch, routes, chunks, heads, size, size)
    y = ((C @ B.transpose(3, 4)).unsqueeze(3) * decay) @ w  # (batch, routes, chunks, heads, size, dim)
    if not known or chunks > 1:
        to_end = B.transpose(3, 4).unsqueeze(3) * decay[..., -1:, :]
        state_of_chunk = to_end @ w  # (batch, routes, chunks, heads, states, dim)
        decay_from_start = exponent.cumsum(-1).exp()  # (batch, routes, chunks, heads, size)
        ends = recurrence(decay_from_start[..., -1:], state_of_chunk.flatten(-2))  # (batch, routes, chunks, heads, *)
        starts = _later(ends, 1).unflatten(-1, state_of_chunk.shape[-2:])
        y = y + decay_from_start.unsqueeze(-1) * (C.unsqueeze(3) @ starts)
    return _up_to(y.transpose(3, 4).flatten(2, 3), length)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "selective_scan": selective_scan,
    "cross_selective_scan": cross_selective_scan,
    "cross_ssd": cross_ssd,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "depthwise_conv": depthwise_conv,
    "gelu_mlp": gelu_mlp,
}
