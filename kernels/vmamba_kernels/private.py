"""What is used here although PyTorch, timm or submitit call it private, in one place; a test names what moved.

`from vmamba_kernels.private import NAME` imports it from where it is, when first asked for: the kernels need no timm.
"""

from importlib import import_module
from typing import Any

import torch

WHERE = {
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "feature_take_indices": "timm.models._features",
    "MATCH_PREV_GROUP": "timm.models._manipulate",
}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(WHERE[name]), name)


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode AD is in force."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
