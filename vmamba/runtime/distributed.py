"""The processes of a run: which of them am I, and what they do together."""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.runtime.lifeline import Lifeline

SECONDS_LONGER = 30  # that rank 0 waits in a collective: it keeps the log, and hears what the others say of theirs


@dataclass(frozen=True)
class World:
    """This process among all of them.  A run without a launcher is a world of one."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine
    device: torch.device
    on_machine: tuple[int, int] = (0, 1)  # which of its machine's processes it is, and how many there are
    lifeline: Lifeline = field(default_factory=Lifeline, compare=False)

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: str = "auto", timeout: float = 1800) -> Iterator[World]:
    """Join the other processes of the run (NCCL on GPUs, gloo on CPUs) and leave them at the end.

    `device`: "auto" (a GPU where there is one), "cpu" or "cuda".  `timeout`: seconds to wait for the others.
    Raises UserError where the device cannot be had, and where the launcher's environment does not say who takes part.
    """
    rank, size, local_rank = _launched_as()
    world = World(rank, size, local_rank, _choose_device(device, local_rank))
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
    if size > 1:
        lifeline = Lifeline(rank, size, timeout)
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                rank=rank,
                world_size=size,
                device_id=world.device if on_gpu else None,
                timeout=timedelta(seconds=timeout + (0 if rank else SECONDS_LONGER)),
            )
            lifeline.connect(lambda value: gather(value)[0])
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"process {rank} of {size} cannot join the others at {where}: {error}") from error
        with lifeline.explaining():
            hosts = gather(socket.gethostname())
        world = replace(world, lifeline=lifeline, on_machine=_place_on_machine(rank, hosts))
    yield world
    # After an exception the group is left to the end of the process: closing it would wait for the others.
    if size > 1:
        world.lifeline.leave()
        dist.destroy_process_group()


def _place_on_machine(rank: int, hosts: list[str]) -> tuple[int, int]:
    """World.on_machine of `rank`; `hosts` are the machines of all, by rank."""
    return hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])


def _launched_as() -> tuple[int, int, int]:
    """(rank, size, local rank) from what torchrun, torch.distributed.launch or srun left in the environment."""
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, size, local_rank = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", default="0")
        if not 0 <= rank < size:
            raise UserError(f"RANK is {rank} and WORLD_SIZE {size}; ranks count from 0 up to WORLD_SIZE - 1")
        if size > 1:
            _text("MASTER_ADDR"), _number("MASTER_PORT")
        return rank, size, local_rank
    # Set by srun alone: a batch script that starts python itself has SLURM_NTASKS too, and no peers.
    if "SLURM_PROCID" in env and _number("SLURM_STEP_NUM_TASKS", default="1") > 1:
        env.setdefault("MASTER_ADDR", _address(first_host(_text("SLURM_STEP_NODELIST"))))
        env.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID") % 20000))
        return _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_LOCALID")
    return 0, 1, 0


def _text(name: str, default: str | None = None) -> str:
    value = os.environ.get(name, default)
    if not value:
        raise UserError(
            f"the environment says that this is one process of several and lacks {name}; start the run with torchrun "
            f"or srun, or unset RANK and WORLD_SIZE"
        )
    return value


def _number(name: str, default: str | None = None) -> int:
    text = _text(name, default)
    if not text.isdecimal():
        raise UserError(f"{name} is '{text}' in the environment; expected a whole number")
    return int(text)


def first_host(node_list: str) -> str:
    """The first name of a SLURM node list: "gpu[07-09,12],big1" -> "gpu07"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", node_list)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is '{node_list}' in the environment; expected names of nodes")
    return "".join(found.groups(default=""))


def _address(host: str) -> str:
    """A node's SLURM name where it resolves, else the address SLURM itself uses for the node."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        shown = ""
        with suppress(OSError):  # without scontrol there is nobody to ask
            shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True).stdout
        address = re.search(r"NodeAddr=(\S+)", shown)
        if address is None:
            raise UserError(f"the first node, '{host}', has no address that is known here; set MASTER_ADDR") from None
        return address.group(1)


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


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers (running statistics), as its checkpoint has them."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
