"""Operators that give a result's shape and nothing else, on the meta device: what a count of operations runs on."""

import torch
from torch import Tensor

from .registry import Call


def why_not(call: Call) -> str | None:
    return None if call.device.type == "meta" else f"it knows shapes only, and the tensors are on {call.device}"


def cross_selective_scan(x, x_proj_weight, dt_weight, dt_bias, A, D, routes, out_dtype) -> Tensor:
    return _cross_selective_scan(x, x_proj_weight, dt_weight, dt_bias, A, D, out_dtype)


def cross_ssd(x, x_proj_weight, dt_bias, A, D, routes, chunk_size, out_dtype) -> Tensor:
    return _cross_ssd(x, x_proj_weight, dt_bias, A, D, out_dtype)


@torch.library.custom_op("vmamba::cross_selective_scan_shapes", mutates_args=(), device_types="meta")
def _cross_selective_scan(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, dtype=out_dtype)


@torch.library.custom_op("vmamba::cross_ssd_shapes", mutates_args=(), device_types="meta")
def _cross_ssd(
    x: Tensor, x_proj_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, dtype=out_dtype)


OPERATORS = {"cross_selective_scan": cross_selective_scan, "cross_ssd": cross_ssd}
