"""One optimiser step: what every task does with its batches once it can turn one into a loss."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from yacs.config import CfgNode

from vmamba.errors import UserError
from vmamba.models.compilation import WITH_CUDA_GRAPHS, compile_options
from vmamba.runtime.average import take_over
from vmamba.runtime.distributed import World, sum_over_processes
from vmamba.runtime.precision import autocast
from vmamba.runtime.sharding import blocks, is_sharded, own, whole
from vmamba.runtime.state import TrainState
from vmamba_kernels.private import _foreach_add_, _foreach_lerp_, _foreach_mul, takes_found_inf


@dataclass(frozen=True)
class StepReport:
    """What became of one step, the same on all processes."""

    step: int  # completed with it
    lr: float
    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    loss_scale: float
    stop: bool  # a process was asked to stop
    parts: dict[str, float]  # what the loss is the sum of, where a task tells

    @property
    def good(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Unread:
    """The numbers of a report on their way from the device."""

    def __init__(self, step: int, lr: float, parts: Sequence[str], numbers: Tensor):
        self.step, self.lr, self.parts = step, lr, parts
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.there = torch.cuda.Event() if numbers.is_cuda else None
        if self.there:
            self.there.record()

    def read(self) -> StepReport:
        """Waits for the device to come so far."""
        if self.there:
            self.there.synchronize()
        loss, *parts, stops, grad_norm, scale = self.numbers.tolist()
        named = dict(zip(self.parts, parts, strict=True))
        return StepReport(self.step, self.lr, loss, grad_norm, scale, stops > 0, named)


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
    if mode and is_sharded(model):
        if mode in WITH_CUDA_GRAPHS:
            raise UserError(
                f"TRAIN.COMPILE is {mode} and TRAIN.PARALLEL fsdp; CUDA graphs need parameters that stay where they "
                f"are, so use TRAIN.COMPILE default, or TRAIN.PARALLEL ddp"
            )
        for block in blocks(model):  # what is gathered between them stays outside
            block.compile(**compile_options(model, mode))
    elif mode:
        model.compile(**compile_options(model, mode))
    if world.size == 1 or is_sharded(model):
        return model
    return DDP(model, device_ids=[world.device] if on_gpu else None, gradient_as_bucket_view=True)  # else copied back


def synchronised(model: nn.Module, config: CfgNode, world: World) -> nn.Module:
    """The model with its batch norms over all processes, where MODEL.SYNC_BN says so; PyTorch's need GPUs."""
    together = config.MODEL.SYNC_BN and world.size > 1 and world.device.type == "cuda"
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if together else model


class OptimizerStep:
    """Turns the micro-batches of one step into one update of `state`, the same as their union would give.

    `loss` is the task's, called with `model`, the parallel form of `state.model`.
    """

    def __init__(self, config: CfgNode, world: World, model: nn.Module, loss: Loss):
        self.config, self.world, self.model, self.loss = config, world, model, loss
        self.unread: Unread | None = None  # of the step before

    def __call__(self, state: TrainState, batches: Iterable, stop: bool = False) -> list[StepReport]:
        """One step; a step whose loss or gradient is not finite on any process is skipped on all, and counted.

        Returns the reports that have come in: of this step; or, where it `reads_late`, of the one before, so that the
        process goes on to the next step while the device computes this one.  `state` counts what is reported; `settle`
        brings in the rest.

        `batches`: on the device.  `stop`: this process was asked to stop; the report says whether any was.
        Raises UserError after TRAIN.MAX_BAD_STEPS bad steps in a row.
        """
        state.schedule.set_rate(state.step)
        buffers = [buffer.clone() for buffer in state.model.buffers()]
        losses = self._backward(state, batches)
        sums = torch.stack([*losses.values(), torch.zeros((), device=self.world.device).fill_(stop)])
        sum_over_processes(sums)
        state.scaler.unscale_(state.optimizer)
        clip = self.config.TRAIN.CLIP_GRAD or float("inf")
        norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), clip))
        state.advance()
        scale = state.scaler.scale(torch.ones((), device=self.world.device))
        numbers = torch.cat([sums, torch.stack([norm, scale])])
        unread = Unread(state.step, state.rate, [*losses][1:], numbers)
        if self.reads_late(state):
            reports = self.settle(state)
            self.unread = unread
            self._update_where(sums[0].isfinite() & norm.isfinite(), state, buffers)
        else:
            reports = [unread.read()]
            self._update_if(reports[0].good, state, buffers)
            self._count(state, reports[0])
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return reports

    def reads_late(self, state: TrainState) -> bool:
        """Whether a step's report is read behind the next one: where a device computes beside the process, and the
        optimiser can skip a step by itself, which it cannot of tensors in shares."""
        skips = takes_found_inf(state.optimizer) and not is_sharded(state.model)
        return self.world.device.type != "cpu" and skips

    def settle(self, state: TrainState) -> list[StepReport]:
        """The report that is still out, if there is one, counted; then `state` is whole and can be saved."""
        if self.unread is None:
            return []
        report, self.unread = self.unread.read(), None
        self._count(state, report)
        return [report]

    def _update_if(self, good: bool, state: TrainState, buffers: Sequence[Tensor]) -> None:
        if not good:
            for buffer, before in zip(state.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            return
        state.optimizer.step()
        if state.ema and is_sharded(state.model):
            good = torch.ones((), dtype=torch.bool, device=self.world.device)
            update_where(good, state.ema, state.model, self._step_of_the_average(state))
        elif state.ema:
            state.ema.update(state.model, step=self._step_of_the_average(state))
        if state.ema:
            self._switch(state)

    def _update_where(self, good: Tensor, state: TrainState, buffers: Sequence[Tensor]) -> None:
        """The same, to the bit, of a `good` that only the device knows."""
        state.optimizer.found_inf = (~good).float()  # what the fused optimisers do nothing for
        state.optimizer.step()
        del state.optimizer.found_inf
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(good, buffer, before))
        if state.ema:
            update_where(good, state.ema, state.model, self._step_of_the_average(state))
            self._switch(state)

    def _step_of_the_average(self, state: TrainState) -> int | None:
        ema = self.config.TRAIN.EMA
        return state.step if ema.WARMUP or ema.KIND == "mean" else None

    def _switch(self, state: TrainState) -> None:
        if self.config.TRAIN.EMA.SWITCH and state.step % state.steps_per_epoch == 0:
            take_over(state.ema, state.model)

    def _backward(self, state: TrainState, batches: Iterable) -> dict[str, Tensor]:
        """Accumulate the gradient of the step's mean loss; returns this process's part of that mean, of the whole loss
        first and then of what it is made of."""
        count = self.config.TRAIN.ACCUMULATION_STEPS
        total = {"loss": torch.zeros((), device=self.world.device)}
        for micro_step, batch in enumerate(batches):
            # What the model draws (stochastic depth, dropout) depends on where we are, not on how we came here.
            torch.manual_seed(_mix(self.config.SEED, state.step, micro_step, self.world.rank))
            last = micro_step == count - 1
            if is_sharded(state.model):
                self.model.set_requires_gradient_sync(last)
            with self.model.no_sync() if isinstance(self.model, DDP) and not last else nullcontext():
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

    def _count(self, state: TrainState, report: StepReport) -> None:
        overflow = math.isfinite(report.loss) and state.scaler.is_enabled() and report.loss_scale > 1
        state.count(report.loss, report.grad_norm, good=report.good, overflow=overflow)
        if state.bad_steps_in_a_row >= self.config.TRAIN.MAX_BAD_STEPS:
            raise UserError(
                f"the loss ({report.loss:g}) or the gradient's norm ({report.grad_norm:g}) was not finite in "
                f"{state.bad_steps_in_a_row} steps in a row, up to step {report.step}; try a lower TRAIN.BASE_LR, a "
                f"longer warm-up, or --disable-amp"
            )


@torch.no_grad()
def update_where(good: Tensor, ema: ModelEmaV3, model: nn.Module, step: int | None) -> None:
    """`ema.update(model, step)`, to the bit, where `good`; else the average moves towards itself."""
    decay = ema.get_decay(step)
    if decay == 1:
        return
    pairs = zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True)
    values = [(own(average), own(weight)) for average, weight in pairs]
    averages, weights = zip(*[pair for pair in values if pair[0].is_floating_point()], strict=True)
    ends = _foreach_mul(weights, good.float())
    _foreach_add_(ends, _foreach_mul(averages, (~good).float()))
    _foreach_lerp_(averages, ends, weight=1 - decay)
    for average, weight in values:
        if not average.is_floating_point():
            average.copy_(weight)  # a count, such as of a batch norm: it is put back after a bad step


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
