"""What the trainer does not know of a run.  A task is a room `vmamba/<name>/`: `keys.py`, and `Task` in `task.py`."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.data.loaders import EvalLoader, TrainLoader
from vmamba.models.pretrained import Checkpoint
from vmamba.runtime.distributed import World

Results = dict[str, float]  # of an evaluation by name; those of the EMA's weights begin with "ema_"


class Meter(Protocol):
    """One evaluation in the making."""

    def add(self, model: nn.Module, batch: Any) -> None:
        """Evaluate one batch, on the model's device and finished by the loader, without waiting for the device."""

    def results(self) -> Results:
        """Over the batches of all processes; each calls it once, at the end.  Raises UserError without any image."""

    def details(self) -> dict[str, Any]:
        """What else the results tell, such as each class's, for a JSON file."""

    def files(self) -> dict[str, bytes]:
        """Predictions to keep, by the name of their file: of the batch just added, or after `results` of all."""


class Task(Protocol):
    """Made of a config.  The trainer calls what follows and saves, logs and measures around it."""

    headline: str  # name of the result, the higher the better, that decides which checkpoint is the best
    panels: Mapping[str, str]  # of the curves, beside loss and learning rate: title -> name of a result
    average: nn.Module | None  # the model with the average of the weights, where there is one: the trainer sets it

    def check(self) -> None:
        """Before anything is done: raises UserError for settings that no training can have, of those that are seen
        without model and data."""

    def build_model(self) -> nn.Module:
        """On the CPU, random weights.  Raises UserError for options that cannot be."""

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Take over the weights of the whole model.  Raises UserError, loading nothing, where they do not fit."""

    def start_from(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Take over weights to start from, which may be of a part.  Raises UserError, loading nothing, as `load`."""

    def train_loader(self, world: World) -> TrainLoader:
        """Raises UserError when the data is not there or does not fit the config."""

    def eval_loader(self, world: World) -> EvalLoader:
        """This process's share of the held-out data."""

    def loss(self, model: nn.Module, batch: Any, *, step: int, part: int) -> Tensor | dict[str, Tensor]:
        """Mean loss of a micro-batch, the `part`-th of `step`'s global batch; of a dict the sum is trained and each
        is logged.  The batch is on the model's device, finished by the loader.  Called under autocast; what it draws is
        a function of SEED, `step` and `part`."""

    def meter(self, world: World) -> Meter: ...

    def describe(self, results: Results) -> str:
        """The results of one set of weights in words."""

    def cost(self, model: nn.Module) -> str:
        """Multiply-adds of one image, in words."""

    def example(self, world: World) -> tuple[Any, ...]:
        """Arguments of the model for timing it: a batch of DATA.BATCH_SIZE."""


def open_task(config: CfgNode) -> Task:
    """The task that TASK names."""
    return import_module(f"vmamba.{config.TASK}.task").Task(config)
