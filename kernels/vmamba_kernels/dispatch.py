"""Functions as operators of PyTorch, which eager mode calls without the operator's price."""

from collections.abc import Callable

import torch
from torch import Tensor

from .private import is_watched

LIBRARY = torch.library.Library("vmamba", "FRAGMENT")

# What a call holds when nothing watches it.  Other tensors (fake, distributed, functional) and what watches the thread
# (modes, transforms of torch.func, traces) must get to see the operator.
_TENSORS = {Tensor, torch.nn.Parameter}
_VALUES = {type(None), bool, int, float, str, torch.dtype}


class Operator:
    """`function` as torch.ops.vmamba.`name`, for tensors of the dispatch key `key`.

    Through the dispatcher a call enters Python three times, 25 microseconds forward and as many backward, more than a
    small kernel takes.  So a call that nothing watches goes to the function, or to an autograd.Function around it.

    Args:
        function: annotated as torch.library.infer_schema asks; its first argument is a tensor.
        fake: its results' shapes and dtypes.
        setup_context, backward: the gradient, as torch.library.register_autograd takes them; None if it has none.
    """

    key = ""
    backend = ""

    def __init__(
        self, name: str, function: Callable, fake: Callable, setup_context: Callable | None = None,
        backward: Callable | None = None,
    ):  # fmt: skip
        self._function, qualified = function, f"vmamba::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._on_its_device, self.key)
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_autograd(
            qualified, backward or self._no_gradient, setup_context=setup_context, lib=LIBRARY
        )
        self._operator = getattr(torch.ops.vmamba, name).default
        self._differentiated = None
        if backward is not None:
            self._differentiated = _autograd_function(name, self._on_its_device, setup_context, backward)

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self._operator(*args)
        plain = not is_watched()
        gradient = False
        for value in args:
            if type(value) in _TENSORS:
                gradient = gradient or value.requires_grad
                plain = plain and not value.is_neg()  # the dispatcher resolves a lazy negation
            else:
                plain = plain and type(value) in _VALUES
        gradient = gradient and torch.is_grad_enabled()
        if not plain or (gradient and self._differentiated is None):
            return self._operator(*args)
        return self._differentiated.apply(*args) if gradient else self._on_its_device(*args)

    def _on_its_device(self, *args):
        return self._function(*args)

    def _no_gradient(self, ctx, *_):
        raise NotImplementedError(f"the {self.backend} backend has no second derivatives; backend 'reference' has")


def _autograd_function(name: str, function: Callable, setup_context: Callable, backward: Callable):
    def forward(ctx, *inputs):
        output = function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)
