"""Number formats of a run: autocast, the loss scaler, TF32."""

from contextlib import AbstractContextManager

import torch
from torch.amp import GradScaler
from yacs.config import CfgNode

from vmamba.errors import UserError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def set_up_precision(config: CfgNode, device: torch.device) -> None:
    """Allow or forbid TF32.  Raises UserError for a dtype of AMP that the device cannot serve."""
    torch.set_float32_matmul_precision("high" if config.TF32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.TF32
    half = config.AMP.ENABLE and config.AMP.DTYPE == "bfloat16" and device.type == "cuda"
    if half and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"AMP.DTYPE is bfloat16, which {torch.cuda.get_device_name(device)} does not compute in; "
            f"use --opts AMP.DTYPE float16, or --disable-amp"
        )


def compute_dtype(config: CfgNode) -> torch.dtype:
    """What matrix products compute in."""
    return _DTYPES[config.AMP.DTYPE] if config.AMP.ENABLE else torch.float32


def autocast(config: CfgNode, device: torch.device) -> AbstractContextManager:
    """The context for a forward pass."""
    return torch.autocast(device.type, dtype=_DTYPES[config.AMP.DTYPE], enabled=config.AMP.ENABLE)


def build_scaler(config: CfgNode, device: torch.device) -> GradScaler:
    """The loss scaler: at work in float16, passing everything through in the wider formats."""
    return GradScaler(device.type, enabled=config.AMP.ENABLE and config.AMP.DTYPE == "float16")


def describe_precision(config: CfgNode) -> str:
    if config.AMP.ENABLE:
        return f"{config.AMP.DTYPE} autocast"
    return "float32 with TF32 products" if config.TF32 else "float32"
