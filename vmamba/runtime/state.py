"""All that training is at a moment: what a checkpoint holds and a resumed run goes on from."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from vmamba.errors import UserError
from vmamba.models.weights import load_weights
from vmamba.runtime.distributed import gather
from vmamba.runtime.optim import Schedule


@dataclass
class TrainState:
    model: nn.Module  # bare: not wrapped for several processes
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    schedule: Schedule
    scaler: GradScaler
    steps_per_epoch: int
    config: dict[str, Any]  # as plain values
    epoch: int = 0  # epochs completed
    step: int = 0  # optimiser steps completed, over all epochs
    bad_steps: int = 0  # steps skipped without a finite loss and gradient, over all epochs
    bad_steps_in_a_row: int = 0
    epoch_loss: float = 0.0  # sum over the steps of the epoch in progress, bad ones left out
    epoch_loss_steps: int = 0
    max_accuracy: float = -1.0  # percent; below 0: not evaluated yet
    max_accuracy_ema: float = -1.0
    random_states: list[dict] = field(default_factory=list)  # of every process, by rank

    @property
    def step_in_epoch(self) -> int:
        return self.step - self.epoch * self.steps_per_epoch

    @property
    def mean_loss(self) -> float:
        """Of the epoch in progress, bad steps left out."""
        return self.epoch_loss / self.epoch_loss_steps if self.epoch_loss_steps else float("nan")

    @property
    def best(self) -> float:
        """The best top-1 accuracy so far, of the plain or the EMA weights."""
        return max(self.max_accuracy, self.max_accuracy_ema)

    def gather_random_states(self) -> None:
        """Collect the random states of all processes; all call it before one saves."""
        self.random_states = gather(_random_state())

    def restore_random_state(self, rank: int) -> None:
        """Put this process's random generators where they were (a process that was not there keeps its own)."""
        if rank < len(self.random_states):
            _set_random_state(self.random_states[rank])

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in _PLAIN}
        return state | {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {"step": self.step},  # the rest of it is the config's
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], source: str = "the checkpoint") -> None:
        """Take over a saved state; rates and weight decay stay the config's, so that a changed config has its effect.

        Raises UserError, naming `source`, when the state is of another model, optimiser or number of steps an epoch.
        """
        missing = [name for name in ("model", "optimizer", *_PLAIN) if name not in state]
        if missing:
            raise UserError(
                f"'{source}' cannot be resumed, it lacks {', '.join(missing)}; start from its weights with --pretrained"
            )
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(
                f"'{source}' is of a run with {state['steps_per_epoch']} steps an epoch and this one has "
                f"{self.steps_per_epoch}; keep DATA.BATCH_SIZE x processes x TRAIN.ACCUMULATION_STEPS, or start from "
                f"its weights with --pretrained"
            )
        load_weights(self.model, state["model"], source)
        if self.ema:
            load_weights(self.ema.module, state["model_ema"] or state["model"], source)
        self._load_optimizer(state, source)
        self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())
        for name in _PLAIN:
            if name != "config":
                setattr(self, name, state[name])

    def _load_optimizer(self, state: dict[str, Any], source: str) -> None:
        name, saved = (config["TRAIN"]["OPTIMIZER"]["NAME"] for config in (self.config, state["config"]))
        if name != saved:
            raise UserError(
                f"'{source}' was written with TRAIN.OPTIMIZER.NAME {saved} and this run has {name}; keep it, or start "
                f"from the weights with --pretrained"
            )
        own = [{key: group[key] for key in ("initial_lr", "weight_decay")} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise UserError(
                f"the optimiser in '{source}' has other groups of parameters ({error}); keep TRAIN.DECAY_SSM, or start "
                f"from the weights with --pretrained"
            ) from error
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)


_PLAIN = (
    "config",
    "steps_per_epoch",
    "epoch",
    "step",
    "bad_steps",
    "bad_steps_in_a_row",
    "epoch_loss",
    "epoch_loss_steps",
    "max_accuracy",
    "max_accuracy_ema",
    "random_states",
)


def _random_state() -> dict[str, Any]:
    kind, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    kind, keys, *position = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
