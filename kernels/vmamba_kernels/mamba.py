"""Mamba's names for the selective scan: its functions on our operators, and its package as one of our backends.

`selective_scan_fn` and `selective_state_update` have the arguments of `mamba_ssm`'s functions of these names, so that a
model written for that package runs here by changing one import.
"""

import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import check_tensors, selective_scan
from .reference import wider
from .registry import BackendError, Call


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan with the arguments and the meaning of Mamba's function (arXiv 2312.00752).

    Args:
        u, delta: (batch, dim, length).
        A: (dim, states), real.
        B, C: (dim, states), the same at every position; (batch, states, length), shared by all channels; or
            (batch, groups, states, length).
        D, delta_bias: (dim,) or None.
        z: (batch, dim, length) or None; the result is multiplied by silu(z).
        delta_softplus: whether the step sizes go through a softplus after the bias.
        return_last_state: also return the state after the last position.
        initial_state: (batch, dim, states), before the first position; None: zeros.
        backend: as in `vmamba_kernels.selective_scan`.

    Returns:
        (batch, dim, length) in u's dtype, and with `return_last_state` also (batch, dim, states) in float32
        (float64 for float64).

    Raises:
        ValueError: A, B or C is complex, or a shape does not fit, naming the argument.
        BackendError: the backend asked for is unknown or cannot serve the call.
    """
    for name, t in (("A", A), ("B", B), ("C", C)):
        if isinstance(t, Tensor) and t.is_complex():
            raise ValueError(f"{name} is {t.dtype}; only real state spaces are supported, so give a real {name}")
    check_tensors(dict(u=u, delta=delta, A=A, B=B, C=C), D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    if u.dim() != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}; it must be (batch, dim, length)")
    batch, dim, length = u.shape
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}; beside u of shape {tuple(u.shape)} it must have the same")
    B, C = _by_group("B", B, batch, length), _by_group("C", C, batch, length)
    groups = math.lcm(B.shape[1], C.shape[1])
    B, C = (_in_groups(t, groups) for t in (B, C))
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    result = selective_scan(
        u, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus, initial_state=initial_state,
        return_last_state=return_last_state, out_dtype=state_dtype, backend=backend,
    )  # fmt: skip
    if return_last_state:
        return _gated(result[0], z, u.dtype), result[1]
    return _gated(result, z, u.dtype)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One position of the scan, for inference position by position; with the arguments and the meaning of
    `mamba_ssm.ops.triton.selective_state_update`.

    Args:
        state: (batch, dim, states), which becomes the state after this position, in its own memory and dtype.
        x, dt: (batch, dim).
        A: (dim, states), real.
        B, C: (batch, states), shared by all channels; or (batch, groups, states).
        D, dt_bias: (dim,) or None.
        z: (batch, dim) or None; the result is multiplied by silu(z).
        dt_softplus: whether the step sizes go through a softplus after the bias.

    Returns:
        (batch, dim) in x's dtype, without a gradient: the states before are gone.

    Raises ValueError for shapes, dtypes or devices that do not fit, naming the argument, and for a state whose memory
    is that of several of its numbers, as an expanded one's is: `overlaps`.
    """
    check_tensors(dict(state=state, x=x, dt=dt, A=A, B=B, C=C), D=D, z=z, dt_bias=dt_bias)
    if state.dim() != 3:
        raise ValueError(f"state has shape {tuple(state.shape)}; it must be (batch, dim, states)")
    batch, dim, states = state.shape
    for name, t, shape in (
        ("x", x, (batch, dim)),
        ("dt", dt, (batch, dim)),
        ("A", A, (dim, states)),
        ("z", z, (batch, dim)),
        ("D", D, (dim,)),
        ("dt_bias", dt_bias, (dim,)),
    ):
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; beside a state of shape {tuple(state.shape)} it must be {shape}"
            )
    if overlaps(state):
        raise ValueError(
            f"state has strides {state.stride()}, so several of its numbers share one place in memory, as in an "
            f"expanded tensor; give state.clone()"
        )
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        B, C = (_of_channels(name, t, batch, dim, states).to(dtype) for name, t in (("B", B), ("C", C)))
        x_, dt = x.to(dtype), dt.to(dtype)
        if dt_bias is not None:
            dt = dt + dt_bias.to(dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        h = torch.exp(dt[..., None] * A.to(dtype)) * state.to(dtype) + (dt * x_)[..., None] * B
        state.copy_(h)
        y = (h * C).sum(-1)
        if D is not None:
            y = y + D.to(dtype) * x_
        return _gated(y, z, x.dtype)


def overlaps(t: Tensor) -> bool:
    """Whether several numbers of a tensor may lie in one place of memory: unless each dimension steps over all that the
    shorter steps reach."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _of_channels(name: str, t: Tensor, batch: int, dim: int, states: int) -> Tensor:
    """B or C of one position, (batch, states) or (batch, groups, states) -> (batch, dim, states)."""
    t = t.unsqueeze(1) if t.dim() == 2 else t
    if t.dim() != 3 or t.shape[::2] != (batch, states) or t.shape[1] < 1 or dim % t.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}; it must be ({batch}, {states}) or ({batch}, groups, {states})"
        )
    return t.repeat_interleave(dim // t.shape[1], dim=1)


def _by_group(name: str, t: Tensor, batch: int, length: int) -> Tensor:
    """B or C of two, three or four dimensions -> (batch, groups, states, length)."""
    if t.dim() == 2:  # a group for each channel
        return t.unsqueeze(-1).expand(batch, *t.shape, length)
    if t.dim() == 3:
        return t.unsqueeze(1)
    if t.dim() == 4:
        return t
    raise ValueError(
        f"{name} has shape {tuple(t.shape)}; it must be (dim, states), (batch, states, length) or "
        "(batch, groups, states, length)"
    )


def _in_groups(t: Tensor, groups: int) -> Tensor:
    """B or C (batch, groups, states, length) with more groups, each of its own several times.

    By an index: of what repeat_interleave gives torch.compile makes a view that it cannot lay out for other lengths.
    """
    if t.shape[1] == groups:
        return t
    return t.index_select(1, torch.arange(groups, device=t.device) // (groups // t.shape[1]))


def _gated(y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(dtype)


# The backend "mamba_ssm": that package's own kernels, for cross-checks.  Used only when asked for by name.

MAX_STATES = 256
_NOT_INSTALLED = "the package mamba_ssm is not installed (pip install mamba-ssm)"


def why_absent() -> str | None:
    """One sentence why mamba_ssm cannot be used at all, or None."""
    if find_spec("mamba_ssm") is None:
        return _NOT_INSTALLED
    try:
        _theirs()
    except BackendError as error:
        return str(error)
    return None


def why_not(call: Call) -> str | None:
    """One sentence why mamba_ssm cannot serve `call`, or None."""
    if find_spec("mamba_ssm") is None:
        return _NOT_INSTALLED
    if call.device.type != "cuda":
        return f"mamba_ssm needs a GPU and the tensors are on '{call.device}'"
    if torch.float64 in (call.dtype, call.out_dtype):
        return "mamba_ssm computes in float32; the reference computes in float64"
    if call.states > MAX_STATES:
        return f"mamba_ssm handles up to {MAX_STATES} states, and there are {call.states}"
    return None


def _theirs() -> Callable[..., Tensor]:
    try:
        return import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except Exception as error:  # of a build for another PyTorch or CUDA, in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackendError(f"mamba_ssm is installed but cannot be imported: {reason}") from error


def _mamba_ssm_scan(
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
    scan = _theirs()
    # It wants one dtype for what varies along the sequence and returns that dtype; no step size may lose digits.
    dtype = out_dtype
    for t in (u, delta, B, C):
        dtype = wider(dtype, t.dtype)
    u, delta, B, C = (t.to(dtype).contiguous() for t in (u, delta, B, C))
    y = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return y.to(out_dtype)


OPERATORS = {"selective_scan": _mamba_ssm_scan}
