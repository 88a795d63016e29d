"""A tiny state to train: a linear classifier of 4 numbers into 3 classes."""

import pytest
import torch
import yaml
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from vmamba.config import get_config
from vmamba.runtime.distributed import World
from vmamba.runtime.optim import Schedule, build_optimizer
from vmamba.runtime.plan import build_plan
from vmamba.runtime.precision import build_scaler
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import OptimizerStep

CPU = World(0, 1, 0, torch.device("cpu"))


class Tiny:
    """A state, its step, and batches for it."""

    def __init__(self, *opts, model=None, steps_per_epoch=10, late=False):
        self.config = get_config(None, ["AMP.ENABLE", "False", "TRAIN.BASE_LR", "0.1", *opts])
        torch.manual_seed(0)
        model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        optimizer = build_optimizer(self.config, model, 512)
        self.state = TrainState(
            model=model,
            ema=ModelEmaV3(model, decay=0.9, use_warmup=True) if self.config.TRAIN.EMA.ENABLE else None,
            optimizer=optimizer,
            schedule=Schedule(self.config, optimizer, build_plan(self.config, steps_per_epoch)),
            scaler=build_scaler(self.config, CPU.device),
            steps_per_epoch=steps_per_epoch,
            config=yaml.safe_load(self.config.dump()),
        )
        self.step = OptimizerStep(self.config, CPU, model, self.loss)
        if late:  # as it is on a GPU
            self.step.reads_late = lambda state: True

    def loss(self, model, batch, *, step, part):
        inputs, targets = batch
        return F.cross_entropy(model(inputs).float(), targets)

    def batch(self, index, size=8):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)

    def one(self, *batches):
        """The report of a step of these micro-batches."""
        (report,) = [*self.step(self.state, batches), *self.step.settle(self.state)]
        return report

    def train(self, steps):
        return [self.one(self.batch(self.state.step)) for _ in range(steps)]

    def weights(self):
        return {name: value.clone() for name, value in self.state.model.state_dict().items()}


@pytest.fixture
def tiny():
    return Tiny


@pytest.fixture
def same():
    """Whether two nested states are the same, bit for bit."""

    def compare(one, other):
        if isinstance(one, torch.Tensor):
            return torch.equal(one, other)
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(compare(one[key], other[key]) for key in one)
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(compare, one, other))
        return one == other

    return compare
