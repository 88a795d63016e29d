"""What is used here although PyTorch, timm or submitit call it private, in one place; a test names what moved.

`from vmamba_kernels.private import NAME` takes a name of `WHERE` from where it is, when first asked for: the kernels
need no timm.
"""

from importlib import import_module
from typing import Any

import torch

WHERE = {
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "UserError": "torch._dynamo.exc",
    "aoti_compile_and_package": "torch._inductor",
    "aoti_load_package": "torch._inductor",
    "list_mode_options": "torch._inductor",
    "list_options": "torch._inductor",
    "feature_take_indices": "timm.models._features",
    "MATCH_PREV_GROUP": "timm.models._manipulate",
    "_foreach_add_": "torch",
    "_foreach_copy_": "torch",
    "_foreach_lerp_": "torch",
    "_foreach_mul": "torch",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)  # filled in their places
# Dispatch keys that a thread includes when nothing watches its calls.
_UNWATCHED = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
).raw_repr()


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(WHERE[name]), name)


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode AD is in force."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Whether torch.export records what is called.

    The flag itself: PyTorch 2.11's torch.compile takes torch.compiler.is_exporting() for True, always.  PyTorch 2.6 has
    no such flag; there torch.export keeps what it was called with while it records.
    """
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    from torch.export import _trace  # not when this is imported: it brings all of PyTorch's compiler

    return _trace._EXPORT_FLAGS is not None


def is_watched() -> bool:
    """Whether a mode, a transform of torch.func or a trace gets to see what this thread's operators are called with."""
    return bool(torch._C._dispatch_tls_local_include_set().raw_repr() & ~_UNWATCHED)


def promise(holds: torch.SymBool) -> None:
    """Take for granted what is recorded of sizes that are symbols; the program that is recorded checks it."""
    torch._check(holds)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`: hooks, another function in its place, compiled."""
    own = module.__dict__  # vars() is beyond what PyTorch 2.6 compiles
    for name in _HOOKS:  # any() takes four times as long, 200 times a training step
        if own[name]:
            return True
    for hooks in _GLOBAL_HOOKS:
        if hooks:
            return True
    return "forward" in own or module._compiled_call_impl is not None


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser leaves everything as it is where its `found_inf`, a tensor, is 1: PyTorch's fused ones."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def shared_bytes(size: int) -> torch.Tensor:
    """(size,) uint8, not set, in memory that processes share: made there, and not copied to it."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


def raw_stream(device: int) -> int:
    """The current CUDA stream of a device, as a driver's handle."""
    return torch._C._cuda_getCurrentRawStream(device)


def keep_gpu_busy(cycles: int) -> None:
    """A kernel that waits so many cycles."""
    torch.cuda._sleep(cycles)


def batch_file(executor: Any) -> str:
    """The batch file that an executor of submitit would give to SLURM."""
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")
