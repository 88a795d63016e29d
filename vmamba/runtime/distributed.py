"""The processes of a run: which of them am I, and what they do together."""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmamba.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all of them.  A run without a launcher is a world of one."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: str = "auto") -> Iterator[World]:
    """Join the other processes of the run (NCCL on GPUs, gloo on CPUs) and leave them at the end.

    `device`: "auto" (a GPU where there is one), "cpu" or "cuda".  Raises UserError where it cannot be had.
    """
    rank, size, local_rank = _launched_as()
    world = World(rank, size, local_rank, _choose_device(device, local_rank))
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
    if size > 1:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", rank=rank, world_size=size, device_id=world.device if on_gpu else None
        )
    yield world
    # After an exception the group is left to the end of the process: closing it would wait for the others.
    if size > 1:
        dist.destroy_process_group()


def _launched_as() -> tuple[int, int, int]:
    """(rank, size, local rank) from what torchrun, torch.distributed.launch or srun left in the environment."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # Set by srun alone: a batch script that starts python itself has SLURM_NTASKS too, and no peers.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        env.setdefault("MASTER_ADDR", _address(first_host(env["SLURM_STEP_NODELIST"])))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def first_host(node_list: str) -> str:
    """The first name of a SLURM node list: "gpu[07-09,12],big1" -> "gpu07"."""
    prefix, number, suffix = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", node_list).groups(default="")
    return prefix + number + suffix


def _address(host: str) -> str:
    """A node's SLURM name where it resolves, else the address SLURM itself uses for the node."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=True).stdout
        return re.search(r"NodeAddr=(\S+)", shown).group(1)


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"DEVICE is '{name}'; it can be auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("DEVICE is cuda, but PyTorch sees no GPU on this machine; use --opts DEVICE cpu")
    if "SLURM_GPUS_PER_TASK" in os.environ and torch.cuda.device_count() == 1:  # each task sees its own GPU alone
        return torch.device("cuda", 0)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU, PyTorch sees {torch.cuda.device_count()}; start no more "
            f"processes than there are GPUs"
        )
    return torch.device("cuda", local_rank)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """`tensor` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """The `value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], Any]) -> Any:
    """Rank 0 does `work` while the others wait; all get its result, or the UserError it raised."""
    if not dist.is_initialized():
        return work()
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end is gone."""
    if not dist.is_initialized():
        return False
    gone = re.search("Connection closed by peer|Connection reset by peer|Broken pipe", str(error))
    return isinstance(error, dist.DistError) or gone is not None


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers (running statistics), as its checkpoint has them."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
