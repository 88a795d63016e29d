"""Operators that give a result's shape and nothing else, on the meta device: what a count of operations runs on."""

from collections.abc import Callable

import torch
from torch import Tensor

from .registry import Call


def why_not(call: Call) -> str | None:
    return None if call.device.type == "meta" else f"it knows shapes only, and the tensors are on {call.device}"


def selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype) -> Tensor:
    return _selective_scan(u, delta, A, B, C, D, delta_bias, out_dtype)


def cross_selective_scan(x, x_proj_weight, dt_weight, dt_bias, A, D, routes, out_dtype) -> Tensor:
    return _cross_selective_scan(x, x_proj_weight, dt_weight, dt_bias, A, D, out_dtype)


def cross_ssd(x, x_proj_weight, dt_bias, A, D, routes, chunk_size, out_dtype) -> Tensor:
    return _cross_ssd(x, x_proj_weight, dt_bias, A, D, out_dtype)


def _operator(function: Callable) -> Callable:
    """torch.ops.vmamba.NAME_shapes, which has a fake implementation and no other."""
    name = f"{function.__name__.lstrip('_')}_shapes"
    torch.library.define(f"vmamba::{name}", torch.library.infer_schema(function, mutates_args=()))
    torch.library.register_fake(f"vmamba::{name}", function)
    return getattr(torch.ops.vmamba, name)


@_operator
def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty_like(u, dtype=out_dtype)


@_operator
def _cross_selective_scan(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, dtype=out_dtype)


@_operator
def _cross_ssd(
    x: Tensor, x_proj_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, dtype=out_dtype)


OPERATORS = {"selective_scan": selective_scan, "cross_selective_scan": cross_selective_scan, "cross_ssd": cross_ssd}
