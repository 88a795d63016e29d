"""The weights of a block in the dtype of autocast, all in one launch.

Autocast casts every weight where it is used, and its gradient back: two launches a weight, a sixth of what the host
does in a training step that is neither compiled nor a CUDA graph (docs/log.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vmamba_kernels import autocast_dtype, is_plain
from vmamba_kernels.private import _foreach_copy_, has_hooks


def pays(x: Tensor) -> bool:
    """Whether `weights_cast_once` is worth it for a block that is given `x`."""
    if isinstance(x, torch.fx.Proxy) or not (is_plain() and torch.is_grad_enabled()):
        return False
    return x.device.type == "cuda" and autocast_dtype("cuda") is not None


@contextmanager
def weights_cast_once(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside it the float32 weights of `block` that autocast would cast to `dtype`, and train, are cast.

    They are those of linear layers and what a module names in `weights_of_autocast`; a module with hooks keeps its own.
    Gradients reach the parameters as without it, to the bit.
    """
    places = [(module._parameters, name) for module in block.modules() for name in _names(module)]
    own = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), weight in zip(places, _Cast.apply(dtype, *own) if own else (), strict=True):
            parameters[name] = weight
        yield
    finally:
        for (parameters, name), weight in zip(places, own, strict=True):
            parameters[name] = weight


def _names(module: nn.Module) -> list[str]:
    named = ("weight", "bias") if type(module) is nn.Linear else getattr(module, "weights_of_autocast", ())
    if not named or has_hooks(module):
        return []
    return [name for name in named if _trains_in_float32(module._parameters.get(name))]


def _trains_in_float32(weight: Tensor | None) -> bool:
    return type(weight) is nn.Parameter and weight.requires_grad and weight.dtype == torch.float32


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that is not used gets none
        return tuple(_copies(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [each for each in gradients if each is not None]
        # A graph of this pass, for second derivatives, cannot see into `_copies`.
        copies = [each.float() for each in there] if torch.is_grad_enabled() else _copies(there, torch.float32)
        remaining = iter(copies)
        return None, *(None if each is None else next(remaining) for each in gradients)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(each, dtype=dtype) for each in tensors]
    if copies:
        _foreach_copy_(copies, list(tensors))
    return copies
