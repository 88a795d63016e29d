"""Which backends exist, which of them can serve a call, and why the others cannot.

A backend is a module with two names: `OPERATORS`, a dict from operator to function, and `why_not(call)`, one sentence
why it cannot serve a call, or None.  It is imported when first asked for, so that an absent package costs nothing.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib import import_module
from threading import RLock
from types import ModuleType

import torch

from . import flops, reference

MODULES = {
    "cuda": "vmamba_kernels.cuda",
    "triton": "vmamba_kernels.triton",
    "cpu": "vmamba_kernels.cpu",
    "reference": "vmamba_kernels.reference",
    "mamba_ssm": "vmamba_kernels.mamba",
    "shapes": "vmamba_kernels.shapes",
    "graph": "vmamba_kernels.graph",
}

# Fastest first, by the measurements in docs/kernels.md.  What is not listed is used only when asked for by name.
PREFERENCE = {
    "selective_scan": ("cuda", "triton", "cpu", "reference"),
    "cross_selective_scan": ("cuda", "triton", "cpu", "reference"),
    "cross_ssd": ("triton", "reference"),
    "layer_norm": ("cuda", "reference"),
    "add_layer_norm": ("cuda", "reference"),
    "depthwise_conv": ("cuda", "reference"),
    "gelu_mlp": ("cuda", "reference"),
}

LARGE = 96  # channels of a scan that takes long without the cpu backend
NOT_IMPORTED = "it cannot be imported"
_LOADING = RLock()
_FUNCTIONS: dict[tuple[str, str], Callable[..., torch.Tensor]] = {}  # of the backends imported so far


class BackendError(ValueError):
    """No backend, or not the one asked for, can serve the call; the text says why."""


@dataclass(frozen=True)
class Call:
    """What a backend is asked to serve.  Sizes that an operator does not have are 0 or empty.

    Batch, height, width and length are not here: they change from call to call and must not change who serves.
    """

    operator: str
    device: torch.device
    dtype: torch.dtype  # of u or x, after the autocast rule
    out_dtype: torch.dtype
    dim: int = 0  # channels of one route or group
    states: int = 0
    rank: int = 0  # of the step-size projection; the number of heads for cross_ssd
    routes: tuple[str, ...] = ()
    side: int = 0  # of a convolution's window
    gradient: bool = False  # whether a backward pass will follow


@dataclass(frozen=True)
class Choice:
    """Who serves a call, and why nobody faster does."""

    backend: str
    declined: dict[str, str]  # the faster backends, fastest first, and why each cannot; empty if asked for by name

    def __str__(self) -> str:
        """As "triton (not cuda: NVRTC 12.4 does not know sm_120 ...)"."""
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.declined.items())
        return f"{self.backend} ({reasons})" if reasons else self.backend


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass will follow a call on these tensors, and what it needs must be kept.

    A trace keeps the answer for calls with and without gradients, so there they count as enabled.
    """
    enabled = torch.is_grad_enabled() or torch.jit.is_tracing()
    return enabled and any(t is not None and t.requires_grad for t in tensors)


def backends(operator: str | None = None) -> tuple[str, ...]:
    """Names of all backends, or of those considered for `operator`, fastest first."""
    if operator is None:
        return tuple(MODULES)
    if operator not in PREFERENCE:
        raise BackendError(f"unknown operator '{operator}'; known: {', '.join(PREFERENCE)}")
    return PREFERENCE[operator]


def why_not(name: str, call: Call) -> str | None:
    """One sentence why backend `name` cannot serve `call`, or None if it can.

    Raises BackendError for a name that no backend has.
    """
    if name not in MODULES:
        nearest = get_close_matches(name, MODULES, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(MODULES)}"
        raise BackendError(f"unknown backend '{name}'; {hint}")
    try:
        module = load(name)
    except ImportError as error:
        return f"{NOT_IMPORTED} ({error})"
    if call.operator not in module.OPERATORS:
        return f"it has no {call.operator}"
    return module.why_not(call)


def why_absent(name: str) -> str | None:
    """One sentence what keeps backend `name` from serving any call here, a package that is missing or broken; or None.
    Whether there is a GPU does not count: a call may come later, and elsewhere."""
    try:
        module = load(name)
    except ImportError as error:
        return f"{NOT_IMPORTED} ({error})"
    return module.why_absent() if hasattr(module, "why_absent") else None


def load(name: str) -> ModuleType:
    """Import a backend: its functions can then be found, and PyTorch's FlopCounterMode knows what they cost."""
    with _LOADING:  # two threads may scan for the first time at once
        return _load(name)


@cache
def _load(name: str) -> ModuleType:
    module = import_module(MODULES[name])
    _FUNCTIONS.update({(name, operator): function for operator, function in module.OPERATORS.items()})
    flops.register(name)
    return module


def explain(call: Call) -> dict[str, str | None]:
    """For every backend, why it cannot serve `call`, or None if it can."""
    return {name: why_not(name, call) for name in MODULES}


def unknown_routes(call: Call, known: Iterable[str]) -> str | None:
    """One sentence, for a backend's `why_not`, if `call` has routes that the backend does not know."""
    unknown = [route for route in dict.fromkeys(call.routes) if route not in known]
    return f"it does not know the route {' or '.join(unknown)}, only {', '.join(known)}" if unknown else None


def choice(call: Call, backend: str | None = None) -> Choice:
    """Who serves `call`: `backend` itself, or the fastest that can for None and "auto"; and why not the faster ones.

    Raises BackendError when `backend` is unknown or cannot serve the call; there is no silent fallback.
    """
    if backend not in (None, "auto"):
        reason = why_not(backend, call)
        if reason is not None:
            raise BackendError(f"backend '{backend}' cannot serve {call.operator} here: {reason}")
        return Choice(backend, {})
    declined = {}
    for name in _fastest_first(call):
        reason = why_not(name, call)
        if reason is None:
            return Choice(name, declined)
        declined[name] = reason
    raise AssertionError(f"the reference serves every call, but here: {declined}")


def choose(call: Call, backend: str | None = None) -> str:
    """The name of the backend that serves `call`, with the errors of `choice`."""
    return choice(call, backend).backend


def _fastest_first(call: Call) -> list[str]:
    """`PREFERENCE`, but for sequences with few states that want no gradient: the cuda backend puts their channels last
    and back, which takes longer than such a scan (docs/kernels.md)."""
    names = list(PREFERENCE[call.operator])
    if call.operator == "selective_scan" and not call.gradient and call.states < 8:
        names.sort(key=lambda name: name != "triton")
    return names


def implementation(backend: str | None, **call) -> Callable[..., torch.Tensor]:
    """The function of the backend that `choose` names for `Call(**call)`, with the errors of `choose`."""
    name = chosen(backend, **call)  # first, since it may import the backend
    return _FUNCTIONS[name, call["operator"]]


def chosen(backend: str | None, **call) -> str:
    """`choose` of `Call(**call)`, remembered, and as what is compiled may call it."""
    if torch.compiler.is_compiling():
        _load_all_while_tracing()
    return _choose_while_tracing(backend, **call)


def step_sizes(name: str) -> Callable[..., torch.Tensor]:
    """`reference.step_sizes`, as the backend computes it where it has that of its own."""
    return _FUNCTIONS.get((name, "step_sizes"), reference.step_sizes)


@torch.compiler.assume_constant_result  # torch.compile calls it instead of tracing it, and takes its answer as fixed
def _choose_while_tracing(backend: str | None, **call) -> str:
    return _chosen(backend, **call)


@torch.compiler.assume_constant_result
def _load_all_while_tracing() -> None:
    """All backends at once: what torch.compile has seen of `_FUNCTIONS` for one operator it takes for the next one."""
    for name in dict.fromkeys(name for names in PREFERENCE.values() for name in names):
        try:
            load(name)
        except ImportError:  # `why_not` tells it
            continue


@lru_cache(4096)  # what the backends look at does not change while a process runs
def _chosen(backend: str | None, **call) -> str:
    chosen = choice(Call(**call), backend)
    reason = chosen.declined.get("cpu", "")
    if call["device"].type == "cpu" and call.get("dim", 0) >= LARGE and reason.startswith(NOT_IMPORTED):
        _advise(reason)
    return chosen.backend


@cache  # once a process
def _advise(reason: str) -> None:
    warnings.warn(f"scans on this CPU take several times as long as they could: backend 'cpu': {reason}", stacklevel=7)
