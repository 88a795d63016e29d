"""Operators of PyTorch on the GPU."""

import torch

from .. import dispatch
from .compiler import make_current


class Operator(dispatch.Operator):
    """With the tensors' device as the current one."""

    key = "CUDA"
    backend = "cuda"

    def _on_its_device(self, *args):
        device = args[0].device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._on_its_device(*args)
        make_current(device.index)
        return self._function(*args)
