"""One optimiser step: what every task does with its batches once it can turn one into a loss."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from vmamba.errors import UserError
from vmamba.models.compilation import WITH_CUDA_GRAPHS, compile_options
from vmamba.runtime.distributed import World, sum_over_processes
from vmamba.runtime.precision import autocast
from vmamba.runtime.state import TrainState


@dataclass
class StepReport:
    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    stop: bool  # a process was asked to stop
    parts: dict[str, float] = field(default_factory=dict)  # what the loss is the sum of, where a task tells


class Loss(Protocol):
    def __call__(self, model: nn.Module, batch: Any, *, step: int, part: int) -> Tensor | dict[str, Tensor]: ...


def parallelise(model: nn.Module, config: CfgNode, world: World) -> nn.Module:
    """The model to call in training: compiled where the config says so, its gradients averaged over the processes.

    Raises UserError where CUDA graphs cannot be: without a GPU; with several micro-batches a step, whose
    gradients PyTorch would add up in the memory that the next graph writes to; around gradient checkpointing, where
    "cudagraphs" draws what no seed decides.
    """
    mode, count, on_gpu = config.TRAIN.COMPILE, config.TRAIN.ACCUMULATION_STEPS, world.device.type == "cuda"
    if mode == "cudagraphs" and not on_gpu:
        raise UserError(
            f"TRAIN.COMPILE is {mode}, which needs a GPU, and this runs on {world.device.type}; leave it empty"
        )
    if mode in WITH_CUDA_GRAPHS and on_gpu and count > 1:
        raise UserError(
            f"TRAIN.COMPILE is {mode} and TRAIN.ACCUMULATION_STEPS {count}; CUDA graphs cannot accumulate gradients, "
            f"so use TRAIN.COMPILE default, or larger batches and TRAIN.ACCUMULATION_STEPS 1"
        )
    if mode == "cudagraphs" and config.TRAIN.USE_CHECKPOINT:
        raise UserError(
            "TRAIN.COMPILE is cudagraphs and TRAIN.USE_CHECKPOINT true; together they would draw stochastic depth "
            "regardless of SEED, so use TRAIN.COMPILE reduce-overhead, or one of the two"
        )
    if mode:
        model.compile(**compile_options(model, mode))
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if on_gpu else None)


class OptimizerStep:
    """Turns the micro-batches of one step into one update of `state`, the same as their union would give.

    `loss` is the task's, called with `model`, the parallel form of `state.model`.
    """

    def __init__(self, config: CfgNode, world: World, model: nn.Module, loss: Loss):
        self.config, self.world, self.model, self.loss = config, world, model, loss

    def __call__(self, state: TrainState, batches: Iterable, stop: bool = False) -> StepReport:
        """One step; a step whose loss or gradient is not finite on any process is skipped on all, and counted.

        `stop`: this process was asked to stop; the report says whether any was.
        Raises UserError after TRAIN.MAX_BAD_STEPS bad steps in a row.
        """
        state.schedule.set_rate(state.step)
        buffers = [buffer.clone() for buffer in state.model.buffers()]
        losses = self._backward(state, batches)
        sums = torch.stack([*losses.values(), torch.zeros((), device=self.world.device).fill_(stop)])
        sum_over_processes(sums)
        state.scaler.unscale_(state.optimizer)
        clip = self.config.TRAIN.CLIP_GRAD or float("inf")
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        loss, *parts, stops, grad_norm = torch.cat([sums, norm[None]]).tolist()  # the one wait for the device in a step
        if np.isfinite(loss) and np.isfinite(grad_norm):
            state.scaler.step(state.optimizer)
            self._count_good(state, loss, grad_norm)
        else:
            for buffer, before in zip(state.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self._count_bad(state, loss, grad_norm)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return StepReport(loss, grad_norm, stops > 0, dict(zip([*losses][1:], parts, strict=True)))

    def _backward(self, state: TrainState, batches: Iterable) -> dict[str, Tensor]:
        """Accumulate the gradient of the step's mean loss; returns this process's part of that mean, of the whole loss
        first and then of what it is made of."""
        count = self.config.TRAIN.ACCUMULATION_STEPS
        total = {"loss": torch.zeros((), device=self.world.device)}
        for micro_step, batch in enumerate(batches):
            # What the model draws (stochastic depth, dropout) depends on where we are, not on how we came here.
            torch.manual_seed(_mix(self.config.SEED, state.step, micro_step, self.world.rank))
            last = micro_step == count - 1
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                with autocast(self.config, self.world.device):
                    part = micro_step * self.world.size + self.world.rank
                    losses = self.loss(self.model, batch, step=state.step, part=part)
                parts = losses if isinstance(losses, Mapping) else {}
                loss = (sum(parts.values()) if parts else losses) / count
                state.scaler.scale(loss).backward()
            for name, value in {"loss": loss, **{name: part / count for name, part in parts.items()}}.items():
                total[name] = total.get(name, 0) + value.detach() / self.world.size
        assert last, f"{micro_step + 1} micro-batches for a step of {count}"
        return total

    def _count_good(self, state: TrainState, loss: float, grad_norm: float) -> None:
        state.count(good=True)
        state.round_loss += loss
        state.round_grad_norm += grad_norm
        state.round_good_steps += 1
        if state.ema:
            state.ema.update(state.model, step=state.step if self.config.TRAIN.EMA.WARMUP else None)

    def _count_bad(self, state: TrainState, loss: float, grad_norm: float) -> None:
        overflow = np.isfinite(loss) and state.scaler.is_enabled() and state.scaler.get_scale() > 1
        state.count(good=False, overflow=overflow)  # of float16: the scaler halves its scale and all is well
        if state.bad_steps_in_a_row >= self.config.TRAIN.MAX_BAD_STEPS:
            raise UserError(
                f"the loss ({loss:g}) or the gradient's norm ({grad_norm:g}) was not finite in "
                f"{state.bad_steps_in_a_row} steps in a row, up to step {state.step}; try a lower TRAIN.BASE_LR, a "
                f"longer warm-up, or --disable-amp"
            )


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
