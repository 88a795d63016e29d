"""FSDP2: each process keeps its share of every parameter, gradient and moment, and gathers a block's to compute it.

Its checkpoints are those of `shares`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vmamba.runtime.distributed import World

_BLOCK = re.compile(r"(Block|Layer|Bottleneck)$")  # classes of which models are made, ours and timm's


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, by the names of their classes; of one in another the outer."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and _BLOCK.search(type(module).__name__) and any(True for _ in module.parameters()):
            found.append(name)
    return [model.get_submodule(name) for name in found]


def shard(model: nn.Module, world: World) -> None:
    """Leave each process its share of the parameters, in place; all processes call it."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def own(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The same on every process; all call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The whole parameters on every process meanwhile, so that each may call the model as often as it has batches."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def in_shares(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A whole state dict as that of `model`, whose parameters are in shares; all processes call it with the same."""
    like = model.state_dict()
    return {name: as_share(weight, like[name]) for name, weight in weights.items()}


def as_share(tensor: Tensor, example: Tensor | None) -> Tensor:
    if not isinstance(example, DTensor) or isinstance(tensor, DTensor) or example.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)
