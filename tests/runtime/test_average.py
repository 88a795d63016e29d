"""The averages of the weights beside the exponential one, by hand."""

import pytest
import torch
from torch import nn

from vmamba.config import get_config
from vmamba.runtime.average import build_average, take_over
from vmamba.runtime.plan import build_plan


def averages(weights, steps_per_epoch, *opts):
    """What the average is after each step of a run whose only weight was `weights`, one a step."""
    config = get_config(None, ["TRAIN.STEPS", len(weights), "TRAIN.EMA.ENABLE", True, *opts])
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    average = build_average(config, model, build_plan(config, steps_per_epoch))
    seen = []
    for step, weight in enumerate(weights, 1):
        nn.init.constant_(model.weight, weight)
        average.update(model, step)
        seen.append(average.module.weight.item())
    return seen


def test_the_mean_of_the_ends_of_the_last_epochs():
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 10.0]
    three = averages(weights, 2, "TRAIN.EMA.KIND", "mean", "TRAIN.EMA.LAST_EPOCHS", 3)
    assert three == pytest.approx([100, 2, 2, 4, 4, 5, 5, 20 / 3])
    one = averages(weights, 2, "TRAIN.EMA.KIND", "mean", "TRAIN.EMA.LAST_EPOCHS", 1)
    assert one == [100, 2, 2, 4, 4, 6, 6, 10]
    more = averages(weights, 2, "TRAIN.EMA.KIND", "mean", "TRAIN.EMA.LAST_EPOCHS", 9)  # than there are
    assert more[-1] == (2 + 4 + 6 + 10) / 4
    parts = averages(weights, 3, "TRAIN.EMA.KIND", "mean", "TRAIN.EMA.LAST_EPOCHS", 2)  # counted from the end
    assert parts[-1] == (5 + 10) / 2


def test_taking_over_copies_weights_and_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    config = get_config(None, ["TRAIN.EMA.ENABLE", True])
    average = build_average(config, model, build_plan(config, 2))
    kept = {name: value.clone() for name, value in average.module.state_dict().items()}
    model(torch.randn(8, 2))
    nn.init.zeros_(model[0].weight)
    take_over(average, model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
