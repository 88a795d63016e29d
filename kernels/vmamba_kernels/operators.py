"""The public operators: their contract, its checks, the autocast rule, and the choice of a backend.

Mathematics (Mamba, arXiv 2312.00752, equations 2 and 3; VMamba, arXiv 2401.10166, section 4), for one route:

    delta[l, d] = softplus(dt[l, d] + dt_bias[d])
    h[l, d, n]  = exp(delta[l, d] * A[d, n]) * h[l-1, d, n] + delta[l, d] * B[l, n] * u[l, d]
    y[l, d]     = sum_n C[l, n] * h[l, d, n] + D[d] * u[l, d]

The recurrence, A, D, the step size and its softplus are at least float32 in every backend (float64 stays float64);
images, sequences and projections may be bfloat16, float16 or float32.
"""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from . import reference, registry
from .ends import extended
from .private import is_transformed
from .reference import ROUTES, autocast_dtype, wider

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of sequences, the 1-D operator of Mamba.

    Args:
        u: (batch, groups*dim, length), the sequences.
        delta: (batch, groups*dim, length), the step sizes before bias and softplus.
        A: (groups*dim, states), real; negative for a state that decays.
        B, C: (batch, groups, states, length), shared by the channels of a group.
        D: (groups*dim,) the skip, or None.
        delta_bias: (groups*dim,) added to delta, or None.
        delta_softplus: whether the step sizes go through a softplus.
        initial_state: (batch, groups*dim, states), h before the first position; None: zeros.
        return_last_state: also give h after the last position.
        out_dtype: dtype of the result; by default u's, but float32 for float16.
        backend: a name from `backends()`; None or "auto" takes the fastest that can serve the call.

    Returns:
        (batch, groups*dim, length), and with `return_last_state` also (batch, groups*dim, states), in at least float32.
        Each state, of both, costs one more position of the sequence, and a copy of it in at least float32.
        In float32 a state that goes in smaller than 1e-20 may count as 0.  One that goes in as NaN or infinite makes
        its channel's outputs NaN and comes out as NaN; one that comes to be so on the way spoils the other states of
        its channel that come out.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    check_tensors(dict(u=u, delta=delta, A=A, B=B, C=C), D=D, delta_bias=delta_bias, initial_state=initial_state)
    if u.dim() != 3:
        raise ValueError(f"u has shape {_shape(u)}; it must be (batch, groups*dim, length)")
    if B.dim() != 4:
        raise ValueError(f"B has shape {_shape(B)}; it must be (batch, groups, states, length)")
    if A.dim() != 2:
        raise ValueError(f"A has shape {_shape(A)}; it must be (groups*dim, states)")
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    if length < 1:
        raise ValueError(f"u has shape {_shape(u)}; its length must be at least 1")
    if groups < 1 or channels % groups:
        raise ValueError(f"u has {channels} channels, not a multiple of B's {groups} groups")
    _check_shape("delta", delta, (batch, channels, length), "u", u)
    _check_shape("A", A, (channels, states), "u", u)
    _check_shape("B", B, (batch, groups, states, length), "u", u)
    _check_shape("C", C, (batch, groups, states, length), "B", B)
    _check_shape("D", D, (channels,), "u", u)
    _check_shape("delta_bias", delta_bias, (channels,), "u", u)
    _check_shape("initial_state", initial_state, (batch, channels, states), "u", u)
    if autocast_dtype(u.device.type) is not None and u.dtype != torch.float64:
        u, B, C = _to(autocast_dtype(u.device.type), u, B, C)
        delta = delta.float()
    A, D, delta_bias = _to(_state_dtype(u), A, D, delta_bias)
    out_dtype = _out_dtype(u, out_dtype)
    if initial_state is not None or return_last_state:
        name = registry.chosen(
            _that_can_be_seen_into(backend),
            operator="selective_scan",
            device=u.device,
            dtype=A.dtype,
            out_dtype=A.dtype,
            dim=index(channels // groups),
            states=index(states),
            gradient=registry.wants_gradient(u, delta, A, B, C, D, delta_bias, initial_state),
        )
        delta = registry.step_sizes(name)(delta.to(A.dtype), delta_bias, delta_softplus)
        longer = extended(u, delta, A, B, C, initial_state, return_last_state)
        with reference.no_autocast(u.device.type):  # which would round the states
            y = selective_scan(*longer, D, delta_softplus=False, out_dtype=A.dtype, backend=backend)
        before = 0 if initial_state is None else states
        out, last = y.narrow(2, before, length), y.narrow(2, before + length, states) if return_last_state else None
        if initial_state is not None:
            spoilt = initial_state.detach().to(A.dtype) * 0  # NaN for what is not finite, which `extended` puts in as 0
            out, last = out + spoilt.sum(2, keepdim=True), last if last is None else last + spoilt
        return (out.to(out_dtype), last) if return_last_state else out.to(out_dtype)
    scan = registry.implementation(
        _that_can_be_seen_into(backend),
        operator="selective_scan",
        device=u.device,
        dtype=u.dtype,
        out_dtype=out_dtype,
        dim=index(channels // groups),  # a plain number, also while torch.compile traces dynamic sizes
        states=index(states),
        gradient=registry.wants_gradient(u, delta, A, B, C, D, delta_bias),
    )
    return scan(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype)


def cross_selective_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    *,
    routes: Sequence[str] = ROUTES,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The core of SS2D: project every pixel, scan the image along each route, add the routes at each pixel.

    For route k a pixel's projection `x_proj_weight[k] @ x` holds `rank` numbers, which `dt_weight[k]` turns into the
    step sizes, then B and C (`states` numbers each).

    Args:
        x: (batch, height, width, dim), channels last.
        x_proj_weight: (routes, rank + 2*states, dim).
        dt_weight: (routes, dim, rank).
        dt_bias: (routes, dim), or None.
        A: (routes, dim, states), negative.
        D: (routes, dim), or None.
        routes: one name of `ROUTES` for each slice of the weights, at least one, repeats allowed: "row" (row-major),
            "col" (column-major), and the same two walked backwards, "row_rev" and "col_rev".
        out_dtype: dtype of the result; by default x's, but float32 for float16.
        backend: a name from `backends()`; None or "auto" takes the fastest that can serve the call.

    Under autocast x and the two projection weights take its dtype; all else is float32.

    Returns:
        (batch, height, width, dim), the routes added in at least float32.

    Raises:
        ValueError: shapes, dtypes, devices or routes that do not fit, naming the argument.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    routes = _check_routes(routes)
    check_tensors(dict(x=x, x_proj_weight=x_proj_weight, dt_weight=dt_weight, A=A), dt_bias=dt_bias, D=D)
    _check_image(x)
    if A.dim() != 3:
        raise ValueError(f"A has shape {_shape(A)}; it must be (routes, dim, states)")
    if dt_weight.dim() != 3:
        raise ValueError(f"dt_weight has shape {_shape(dt_weight)}; it must be (routes, dim, rank)")
    batch, height, width, dim = x.shape
    states, rank = A.shape[2], dt_weight.shape[2]
    _check_shape("A", A, (len(routes), dim, states), "x", x)
    _check_shape("dt_weight", dt_weight, (len(routes), dim, rank), "x", x)
    _check_shape("x_proj_weight", x_proj_weight, (len(routes), rank + 2 * states, dim), "x", x)
    _check_shape("dt_bias", dt_bias, (len(routes), dim), "x", x)
    _check_shape("D", D, (len(routes), dim), "x", x)
    x, x_proj_weight, dt_weight = _to(_projection_dtype(x), x, x_proj_weight, dt_weight)
    dt_bias, A, D = _to(_state_dtype(x), dt_bias, A, D)
    out_dtype = _out_dtype(x, out_dtype)
    scan = registry.implementation(
        _that_can_be_seen_into(backend),
        operator="cross_selective_scan",
        device=x.device,
        dtype=x.dtype,
        out_dtype=out_dtype,
        dim=index(dim),
        states=index(states),
        rank=index(rank),
        routes=routes,
    )
    return scan(x, x_proj_weight, dt_weight, dt_bias, A, D, routes, out_dtype)


def cross_ssd(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    *,
    routes: Sequence[str] = ROUTES,
    chunk_size: int = 64,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The core of the Mamba-2 block (SSD, arXiv 2405.21060, section 6) along each route of an image, routes added.

    The recurrence is that of `cross_selective_scan` with one step size and one A for all channels of a head, so the
    scan inside a chunk is a masked matrix product.

    Args:
        x: (batch, height, width, dim), channels last; heads divide dim.
        x_proj_weight: (routes, heads + 2*states, dim): the step sizes of the heads, B and C.
        dt_bias: (routes, heads), or None.
        A: (routes, heads), negative.
        D: (routes, heads, dim // heads), or None.
        routes, out_dtype, backend: as in `cross_selective_scan`.
        chunk_size: positions of a route handled by one matrix product; it changes speed, not the result.

    Returns:
        (batch, height, width, dim), the routes added in at least float32.

    Raises:
        ValueError: shapes, dtypes, devices, routes or a chunk size that do not fit, naming the argument.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    routes = _check_routes(routes)
    check_tensors(dict(x=x, x_proj_weight=x_proj_weight, A=A), dt_bias=dt_bias, D=D)
    _check_image(x)
    if A.dim() != 2:
        raise ValueError(f"A has shape {_shape(A)}; it must be (routes, heads)")
    if x_proj_weight.dim() != 3:
        raise ValueError(f"x_proj_weight has shape {_shape(x_proj_weight)}; it must have 3 dimensions")
    batch, height, width, dim = x.shape
    heads = A.shape[1]
    states = (x_proj_weight.shape[1] - heads) // 2
    if heads < 1 or dim % heads:
        raise ValueError(f"x has {dim} channels, not a multiple of A's {heads} heads")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    _check_shape("A", A, (len(routes), heads), "x", x)
    _check_shape("x_proj_weight", x_proj_weight, (len(routes), heads + 2 * states, dim), "x", x)
    _check_shape("dt_bias", dt_bias, (len(routes), heads), "x", x)
    _check_shape("D", D, (len(routes), heads, dim // heads), "x", x)
    x, x_proj_weight = _to(_projection_dtype(x), x, x_proj_weight)
    dt_bias, A, D = _to(_state_dtype(x), dt_bias, A, D)
    out_dtype = _out_dtype(x, out_dtype)
    scan = registry.implementation(
        _that_can_be_seen_into(backend),
        operator="cross_ssd",
        device=x.device,
        dtype=x.dtype,
        out_dtype=out_dtype,
        dim=index(dim),
        states=index(states),
        rank=index(heads),
        routes=routes,
    )
    return scan(x, x_proj_weight, dt_bias, A, D, routes, chunk_size, out_dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last dimension, computed in at least float32 whatever it reads and writes.

    Args:
        x: (..., dim).
        weight, bias: (dim,).
        eps: added to the variance.
        out_dtype: dtype of the result; by default x's.  Autocast changes nothing.
        backend: a name from `backends()`; None or "auto" takes the fastest that can serve the call.

    Returns:
        (..., dim).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    check_tensors(dict(x=x, weight=weight, bias=bias))
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {_shape(x)}; its last dimension, the channels, is empty")
    _check_shape("weight", weight, (x.shape[-1],), "x", x)
    _check_shape("bias", bias, (x.shape[-1],), "x", x)
    weight, bias = _to(_state_dtype(x), weight, bias)
    out_dtype = _out_dtype(x, x.dtype if out_dtype is None else out_dtype)
    norm = registry.implementation(
        _that_can_be_seen_into(backend),
        operator="layer_norm",
        device=x.device,
        dtype=x.dtype,
        out_dtype=out_dtype,
        dim=index(x.shape[-1]),
    )
    return norm(x, weight, bias, eps, out_dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    factor: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What a residual block adds, and the LayerNorm behind it: total = x + factor * branch, and its norm.

    Args:
        x, branch: (batch, ..., dim).
        weight, bias: (dim,).
        factor: (batch,) or (batch, 1, ...), of each image, as stochastic depth draws it; it has no gradient.  None: 1.
        eps, out_dtype, backend: as in `layer_norm`; out_dtype is the norm's, by default the sum's.

    Returns:
        (total, norm), both (batch, ..., dim); the total in the dtype that PyTorch gives x + branch.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a factor that wants a gradient.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    check_tensors(dict(x=x, branch=branch, weight=weight, bias=bias), factor=factor)
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {_shape(x)}; it must be (batch, ..., dim) with at least one channel")
    _check_shape("branch", branch, _shape(x), "x", x)
    _check_shape("weight", weight, (x.shape[-1],), "x", x)
    _check_shape("bias", bias, (x.shape[-1],), "x", x)
    if factor is not None:
        factor = factor.flatten()
        _check_shape("factor", factor, (x.shape[0],), "x", x)
        if factor.requires_grad:
            raise ValueError("factor wants a gradient, which it does not get; detach it")
    (x,) = _to(wider(x.dtype, branch.dtype), x)
    weight, bias = _to(_state_dtype(x), weight, bias)
    if factor is not None:
        (factor,) = _to(branch.dtype, factor)
    out_dtype = _out_dtype(x, x.dtype if out_dtype is None else out_dtype)
    norm = registry.implementation(
        _that_can_be_seen_into(backend),
        operator="add_layer_norm",
        device=x.device,
        dtype=x.dtype,
        out_dtype=out_dtype,
        dim=index(x.shape[-1]),
    )
    return norm(x, branch, factor, weight, bias, eps, out_dtype)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A convolution of each channel, with a border of zeros that keeps the image's size; SiLU of it if so asked.

    Args:
        x: (batch, height, width, dim), channels last.  Under autocast it takes its dtype.
        weight: (dim, 1, side, side) of an odd side, as nn.Conv2d holds it.
        bias: (dim,), or None.
        silu: whether the result is SiLU (arXiv 1702.03118) of the convolution.
        backend: a name from `backends()`; None or "auto" takes the fastest that can serve the call.

    Returns:
        (batch, height, width, dim) in the dtype of x; sums are taken in float32 or more.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    check_tensors(dict(x=x, weight=weight), bias=bias)
    _check_image(x)
    if not x.shape[3]:
        raise ValueError(f"x has shape {_shape(x)}; its last dimension, the channels, is empty")
    if weight.dim() != 4 or weight.shape[2] % 2 == 0:
        raise ValueError(f"weight has shape {_shape(weight)}; it must be (dim, 1, side, side) of an odd side")
    dim, side = x.shape[3], weight.shape[2]
    _check_shape("weight", weight, (dim, 1, side, side), "x", x)
    _check_shape("bias", bias, (dim,), "x", x)
    (x,) = _to(_projection_dtype(x), x)
    convolution = registry.implementation(
        _that_can_be_seen_into(backend),
        operator="depthwise_conv",
        device=x.device,
        dtype=x.dtype,
        out_dtype=x.dtype,
        dim=index(dim),
        side=index(side),
    )
    return convolution(x, weight, bias, silu, registry.wants_gradient(x, weight, bias))


def gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, backend: str | None = None
) -> Tensor:
    """A linear layer, GELU (arXiv 1606.08415, the exact one), and another linear layer.

    Args:
        x: (..., dim).  Under autocast everything takes its dtype.
        weight1, bias1: (hidden, dim) and (hidden,).
        weight2, bias2: (out, hidden) and (out,).
        backend: a name from `backends()`; None or "auto" takes the fastest that can serve the call.

    Returns:
        (..., out) in the dtype of x; GELU and the biases' gradients are computed in float32 or more.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    check_tensors(dict(x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2))
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {_shape(x)}; its last dimension, the channels, is empty")
    if weight1.dim() != 2 or weight2.dim() != 2 or not len(weight1) or not len(weight2):
        shapes = f"{_shape(weight1)} and {_shape(weight2)}"
        raise ValueError(f"weight1 and weight2 have shapes {shapes}; they must be (hidden, dim) and (out, hidden)")
    _check_shape("weight1", weight1, (len(weight1), x.shape[-1]), "x", x)
    _check_shape("bias1", bias1, (len(weight1),), "weight1", weight1)
    _check_shape("weight2", weight2, (len(weight2), len(weight1)), "weight1", weight1)
    _check_shape("bias2", bias2, (len(weight2),), "weight2", weight2)
    dtype = _projection_dtype(x)
    x, weight1, bias1, weight2, bias2 = inputs = _to(dtype, x, weight1, bias1, weight2, bias2)
    mlp = registry.implementation(
        _that_can_be_seen_into(backend),
        operator="gelu_mlp",
        device=x.device,
        dtype=x.dtype,
        out_dtype=x.dtype,
        dim=index(x.shape[-1]),
    )
    return mlp(x, weight1, bias1, weight2, bias2, registry.wants_gradient(*inputs))


def cross_scan(x: Tensor, routes: Sequence[str] = ROUTES) -> Tensor:
    """Lay an image out along routes: (batch, height, width, dim) -> (batch, routes, height*width, dim)."""
    _check_image(x)
    return reference.cross_scan(x, _check_routes(routes))


def cross_merge(y: Tensor, height: int, width: int, routes: Sequence[str] = ROUTES) -> Tensor:
    """Add routes at each pixel, the adjoint of `cross_scan`.

    (batch, routes, height*width, dim) -> (batch, height, width, dim).
    """
    routes = _check_routes(routes)
    if y.dim() != 4:
        raise ValueError(f"y has shape {_shape(y)}; it must be (batch, routes, height*width, dim)")
    _check_shape("y", y, (y.shape[0], len(routes), height * width, y.shape[3]), f"{height} x {width} pixels", None)
    return reference.cross_merge(y, height, width, routes)


def _that_can_be_seen_into(backend: str | None) -> str | None:
    """`backend`; the reference, where none is asked for and `reference.is_seen_into`."""
    if backend in (None, "auto"):
        return "reference" if reference.is_seen_into() else backend
    if backend != "reference" and not torch.compiler.is_compiling() and is_transformed():
        raise registry.BackendError(
            f"backend '{backend}' cannot serve torch.func or forward-mode AD, which see into the reference alone; "
            "leave it at auto, or choose reference"
        )
    return backend


def _projection_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _out_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_dtype is None:
        return torch.float32 if x.dtype == torch.float16 else x.dtype
    if out_dtype not in FLOATS:
        raise _not_a_float("out_dtype", out_dtype)
    return out_dtype


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple([t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors])


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _check_image(x: Tensor) -> None:
    if x.dim() != 4 or min(x.shape[1:3]) < 1:
        raise ValueError(f"x has shape {_shape(x)}; it must be (batch, height, width, dim) with at least one pixel")


def _check_routes(routes: Sequence[str]) -> tuple[str, ...]:
    routes = (routes,) if isinstance(routes, str) else tuple(routes)
    if not routes:
        raise ValueError(f"routes is empty; give at least one of {', '.join(ROUTES)}")
    for route in routes:
        if route not in ROUTES:
            raise ValueError(f"unknown route '{route}'; known: {', '.join(ROUTES)}")
    return routes


def _check_shape(name: str, t: Tensor | None, expected: tuple[int, ...], other: str, like: Tensor | None) -> None:
    if t is not None and tuple(t.shape) != expected:
        beside = f"{other} of shape {_shape(like)}" if like is not None else other
        raise ValueError(f"{name} has shape {_shape(t)}; beside {beside} it must be {expected}")


def check_tensors(needed: dict[str, Tensor], **others: Tensor | None) -> None:
    """Raises ValueError unless all, but for `others` that are None, are tensors of floating-point numbers on the device
    of the first."""
    first, like = next(iter(needed.items()))
    for name, t in {**needed, **others}.items():
        if t is None and name in others:
            continue
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} is a {type(t).__name__}; it must be a tensor")
        if t.dtype not in FLOATS:
            raise _not_a_float(name, t.dtype)
        if t.device != like.device:
            raise ValueError(f"{name} is on {t.device} and {first} on {like.device}; move them to one device")


def _not_a_float(name: str, dtype: torch.dtype) -> ValueError:
    return ValueError(f"{name} is {dtype}; it must be one of {', '.join(map(str, FLOATS))}")
