"""Training on noise, step by step as a run does it, to time what is around a model."""

import logging
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from vmamba.config import get_config
from vmamba.runtime.distributed import World
from vmamba.runtime.plan import build_plan
from vmamba.runtime.run import Run
from vmamba.runtime.start import build_state
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import OptimizerStep, parallelise
from vmamba.runtime.task import open_task


class Training:
    """A model with optimiser and EMA, in the steps of a classification's run.

    Args:
        settings: keys of the config and their values, in turn.
        world: the processes that share the steps.
    """

    def __init__(self, settings: Sequence[object], world: World):
        config = get_config(None, list(map(str, settings)))
        self.device = world.device
        run = Run(config, open_task(config), world, logging.getLogger("vmamba"))
        model = run.task.build_model().to(self.device)
        self.state: TrainState = build_state(run, model, build_plan(config, 1000))
        self._step = OptimizerStep(config, world, parallelise(model, config, world), self._loss)
        shape = (config.DATA.BATCH_SIZE, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
        self._batch = (
            torch.randn(shape, device=self.device),
            torch.zeros(shape[0], dtype=torch.long, device=self.device),
        )

    def step(self) -> None:
        self._step(self.state, [self._batch])

    def wait(self) -> None:
        """Until the device has done all steps."""
        self._step.settle(self.state)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _loss(self, model, batch, *, step, part):
        return F.cross_entropy(model(batch[0]).float(), batch[1])
