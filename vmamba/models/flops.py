"""Parameters, multiply-adds and activations of a model, ours or timm's, counted without running it.

Convention, that of the published tables: a multiply-add is one; convolutions, linear layers and matrix products count
as their multiply-adds, biases are left out; a LayerNorm is 5 an element, a batch norm 2; the recurrence of a scan is
9*B*L*D*N and its skip B*L*D, D being the channels of all routes, whichever backend runs it; SSD as
`vmamba_kernels.flops.cross_ssd` says; activation functions, additions and softmax are not counted.  Activations are
the elements that convolutions, linear layers, matrix products and scans write.
"""

import copy
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba.errors import UserError
from vmamba.models.mamba1d import Mamba1D
from vmamba.models.vssm import VSSM
from vmamba.values import Takes
from vmamba_kernels import registry
from vmamba_kernels.private import TorchDispatchMode

_aten = torch.ops.aten


@dataclass(frozen=True)
class Complexity:
    """For one image."""

    parameters: int
    parameters_without_head: int  # without the last linear layer
    macs: int  # multiply-adds
    activations: int  # elements


def flops(model: nn.Module, size: int | tuple[int, int] = 224) -> int:
    """Multiply-adds of `model`, ours or timm's, for one image of `size` pixels (a side, or (height, width)).

    Raises UserError for what is no size, one that the model does not take, and a model that takes no images.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"this is a {type(model).__name__}, no model; give what vmamba.create_model or timm's gives")
    sides = _sides(size)
    try:
        return complexity(model, sides).macs
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"this {type(model).__name__} does not take images of {sides[0]} x {sides[1]} pixels ({reason}); give "
            f"another size"
        ) from error


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width.  Raises UserError for what is no size."""
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    try:
        height, width = (Takes((int,), at_least=1).check("size", side) for side in sides)
    except ValueError as error:  # a UserError too, which would name one side alone
        raise UserError(f"size is {size!r:.200}; expected a side in pixels, or (height, width)") from error
    return height, width


def complexity(model: nn.Module, size: int | tuple[int, int]) -> Complexity:
    """Count `model`, which is left alone, for images of `size` pixels (a side, or (height, width))."""
    height, width = (size, size) if isinstance(size, int) else size
    shapes = copy.deepcopy(model).to("meta").eval()
    for module in shapes.modules():
        if isinstance(module, (VSSM, Mamba1D)):
            registry.load("shapes")
            module.set_backend("shapes")
    dtype = next((weight.dtype for weight in shapes.parameters()), torch.float32)
    image = torch.empty(1, _in_chans(shapes), height, width, device="meta", dtype=dtype)
    with torch.no_grad(), _Activations() as activations:
        flops = FlopCounterMode(display=False, custom_mapping=_NORMS)
        with flops:
            getattr(shapes, "everywhere", shapes)(image)  # of a detector, whose work depends on what it sees
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_classifier() if hasattr(model, "get_classifier") else nn.Identity()
    return Complexity(
        parameters,
        parameters - sum(parameter.numel() for parameter in head.parameters()),
        flops.get_total_flops() // 2,
        activations.total,
    )


def _in_chans(model: nn.Module) -> int:
    """Channels of the images that `model`, or the backbone in it, takes.  Raises UserError where nothing tells."""
    said = [module.in_chans for module in model.modules() if getattr(module, "in_chans", None)]
    said = said or [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not said:
        raise UserError(f"this {type(model).__name__} has no convolution, so it takes no images; give one that does")
    return said[0]


def _norm(operations: int):
    def formula(x: tuple[int, ...], *_: object, **__: object) -> int:
        return 2 * operations * prod(x)

    return formula


_NORMS = {
    _aten.native_layer_norm: _norm(5),
    _aten.native_batch_norm: _norm(2),
    _aten._native_batch_norm_legit_no_training: _norm(2),
}


class _Activations(TorchDispatchMode):
    """Adds up the elements that the counted operators write."""

    counted = (_aten.convolution, _aten.addmm, _aten.mm, _aten.bmm, _aten.baddbmm)

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if isinstance(out, Tensor) and (packet in self.counted or func.namespace == "vmamba"):
            self.total += out.numel()
        return out
