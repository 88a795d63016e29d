"""Ways to run a model faster than step by step, all of them torch.compile's."""

from typing import Any

import torch
from torch import nn

from vmamba.models.vssm import VSSM
from vmamba_kernels.private import list_mode_options

COMPILE_MODES: dict[str, dict[str, str | bool]] = {  # name -> arguments of torch.compile
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    # The kernels as they are, launched as CUDA graphs: the same numbers.  A graph has one size of batch.
    "cudagraphs": {"backend": "cudagraphs", "dynamic": False},
}
COMBINES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")


def compile_options(model: nn.Module, mode: str) -> dict[str, Any]:
    """Arguments of torch.compile for a way by name, one of `COMPILE_MODES`.

    Where one of our models is inside, without Inductor's rule that images of four dimensions lie in memory as PyTorch's
    "channels_last" when the backward pass will want them: ours lie so with their channels as the last dimension, and
    each was turned once forward and once backward, a seventh of a training step.  On a GPU also with small kernels that
    do not depend on each other, as the casts of weights, in one launch, from PyTorch 2.11 on, with which that
    was measured; 2.6 fails at it on a CPU.  See docs/log.md.
    """
    options = COMPILE_MODES[mode]
    if "backend" in options or not any(isinstance(module, VSSM) for module in model.modules()):
        return dict(options)
    named = list_mode_options(options.get("mode", "default"))
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    one_launch = {"combo_kernels": True} if on_gpu and COMBINES else {}
    return {"options": {**named, "layout_optimization": False, **one_launch}}
