"""All that training is at a moment: what a checkpoint holds and a resumed run goes on from."""

import copy
import random
from collections.abc import Mapping
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
from vmamba.runtime.optim import CONFIGURED, Schedule


@dataclass
class TrainState:
    model: nn.Module  # bare: not wrapped for several processes
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    schedule: Schedule
    scaler: GradScaler
    steps_per_epoch: int
    config: dict[str, Any]  # as plain values
    step: int = 0  # optimiser steps completed
    recorded: int = 0  # the step that the last record is of: behind it lies the round in progress
    bad_steps: int = 0  # steps skipped without a finite loss and gradient
    bad_steps_in_a_row: int = 0
    round_loss: float = 0.0  # sums over the good steps of the round in progress
    round_grad_norm: float = 0.0
    round_good_steps: int = 0
    best: dict[str, float] = field(default_factory=dict)  # the headline's best value so far; "ema_..." of the EMA
    unimproved: int = 0  # evaluations since the last that was the best so far
    best_weights: str | None = None  # "model" or "ema": the better in the evaluation of just these weights
    headline: float | None = None  # what that evaluation found
    random_states: list[dict] = field(default_factory=list)  # of every process, by rank
    data: dict[str, dict] = field(default_factory=dict)  # `Loader.contents` of "train" and "held_out"
    classes: list[str] = field(default_factory=list)  # what they are called, by their numbers; none where nothing tells

    @property
    def epoch(self) -> int:
        """Whole epochs recorded."""
        return self.recorded // self.steps_per_epoch

    @property
    def rate(self) -> float:
        """The learning rate, of layers with rates of their own the highest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def mean_loss(self) -> float:
        """Of the round in progress, bad steps left out; likewise the gradient's norm."""
        return self.round_loss / self.round_good_steps if self.round_good_steps else float("nan")

    @property
    def mean_grad_norm(self) -> float:
        return self.round_grad_norm / self.round_good_steps if self.round_good_steps else float("nan")

    def advance(self) -> None:
        """One more step."""
        self.step += 1
        self.best_weights, self.headline = None, None

    def count(self, loss: float, grad_norm: float, *, good: bool, overflow: bool) -> None:
        """What became of a step; an overflow of float16, for which the scaler halves its scale, is no sign of
        trouble."""
        if good:
            self.bad_steps_in_a_row = 0
            self.round_loss += loss
            self.round_grad_norm += grad_norm
            self.round_good_steps += 1
        else:
            self.bad_steps += 1
            self.bad_steps_in_a_row += not overflow

    def finish_round(self) -> None:
        self.recorded = self.step
        self.round_loss, self.round_grad_norm, self.round_good_steps = 0.0, 0.0, 0

    @property
    def out_of_patience(self) -> bool:
        """Whether TRAIN.PATIENCE ends the training here."""
        patience = self.config["TRAIN"]["PATIENCE"]
        return 0 < patience <= self.unimproved

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
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {"step": self.step},  # the rest of it is the config's
            "scaler": self.scaler.state_dict(),
        }

    def shares(self) -> dict[str, Any]:
        """The tensors that those of a saved state are shaped as, in this process's shares: of a model under FSDP."""
        average = self.ema.module.state_dict() if self.ema else None
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return {"model": self.model.state_dict(), "model_ema": average, "parameters": parameters}

    def load_state_dict(self, state: dict[str, Any], source: str = "the checkpoint") -> None:
        """Take over a saved state; what the config says of the optimiser stays the config's, so that a change has its
        effect.

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
            if name not in ("config", "data", "classes"):
                setattr(self, name, state[name])
        self.classes = self.classes or state["classes"]  # data that does not tell

    def _load_optimizer(self, state: dict[str, Any], source: str) -> None:
        now, saved = (config["TRAIN"]["OPTIMIZER"] for config in (self.config, state["config"]))
        if now["NAME"].lower() != saved["NAME"].lower():
            raise UserError(
                f"'{source}' was written with TRAIN.OPTIMIZER.NAME {saved['NAME']} and this run has {now['NAME']}; "
                f"keep it, or start from the weights with --pretrained"
            )
        # Betas that nobody chose are the state's: the optimiser's own, or the default of the first version.
        configured = set(CONFIGURED) - ({"betas"} if now["BETAS"] == saved["BETAS"] else set())
        groups = self.optimizer.param_groups
        own = [{key: value for key, value in group.items() if key in configured} for group in groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise UserError(
                f"the optimiser in '{source}' has other groups of parameters ({error}); keep TRAIN.DECAY_SSM, "
                f"TRAIN.LAYER_DECAY and TRAIN.FREEZE, or start from the weights with --pretrained"
            ) from error
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)


_PLAIN = (
    "config",
    "steps_per_epoch",
    "step",
    "recorded",
    "bad_steps",
    "bad_steps_in_a_row",
    "round_loss",
    "round_grad_norm",
    "round_good_steps",
    "best",
    "unimproved",
    "best_weights",
    "headline",
    "random_states",
    "data",
    "classes",
)


def of_today(state: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A state as earlier versions wrote it, the first one with `epoch`, `epoch_loss`, `max_accuracy`, ..., in today's
    names.

    `config`: of this run; where it leaves the betas to the optimiser, those of the state were that version's default.
    """
    state = {"unimproved": 0, "headline": None, "data": {}, "classes": []} | state
    if "epoch_loss" not in state:
        return state
    saved = copy.deepcopy(dict(state["config"]))
    if config["TRAIN"]["OPTIMIZER"]["BETAS"] is None and saved["TRAIN"]["OPTIMIZER"]["BETAS"] == [0.9, 0.999]:
        saved["TRAIN"]["OPTIMIZER"]["BETAS"] = None
    steps = state["epoch_loss_steps"]
    found = {"acc1": state["max_accuracy"], "ema_acc1": state["max_accuracy_ema"]}
    return state | {
        "config": saved,
        "recorded": state["epoch"] * state["steps_per_epoch"],
        "round_loss": state["epoch_loss"],
        "round_good_steps": steps,
        "round_grad_norm": float("nan") if steps else 0.0,  # it was not kept
        "best": {name: value for name, value in found.items() if value >= 0},
        "best_weights": None,
    }


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
