"""The state: through a file and back it goes on bit for bit, and refuses what is not its own."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from vmamba.errors import UserError
from vmamba.runtime.checkpoint import read_checkpoint, save_checkpoint
from vmamba.runtime.report import changes
from vmamba.runtime.state import of_today

OPTIONS = {
    "adamw with EMA": ("TRAIN.EMA.ENABLE", "True"),
    "sgd": ("TRAIN.OPTIMIZER.NAME", "sgd"),
    "float16": ("AMP.ENABLE", "True", "AMP.DTYPE", "float16"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_through_a_file_is_the_uninterrupted_one(tiny, same, tmp_path, options):
    whole = tiny(*options)
    whole.train(6)
    first = tiny(*options)
    first.train(3)
    save_checkpoint(first.state.state_dict(), tmp_path / "last.pth")
    second = tiny(*options)
    second.train(1)  # so that everything differs before loading
    second.state.load_state_dict(read_checkpoint(tmp_path / "last.pth"))
    second.train(3)
    assert same(second.state.state_dict(), whole.state.state_dict())


def test_random_states_come_back(tiny, tmp_path):
    case = tiny()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    case.state.gather_random_states()
    save_checkpoint(case.state.state_dict(), tmp_path / "last.pth")
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    case.state.load_state_dict(read_checkpoint(tmp_path / "last.pth"))
    case.state.restore_random_state(0)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    case.state.restore_random_state(5)  # a process that was not there: no error


def test_a_changed_rate_and_weight_decay_have_their_effect(tiny):
    saved = tiny()
    saved.train(1)
    changed = tiny("TRAIN.BASE_LR", "0.01", "TRAIN.WEIGHT_DECAY", "0.2")
    changed.state.load_state_dict(saved.state.state_dict())
    changed.train(1)
    group = changed.state.optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.01, 0.2)
    assert group["lr"] < 0.01


@pytest.mark.parametrize(
    ("key", "value", "name", "expected"),
    [
        ("BETAS", "[0.5, 0.6]", "betas", (0.5, 0.6)),
        ("EPS", "1e-3", "eps", 1e-3),
        ("MOMENTUM", "0.1", "momentum", 0.1),
    ],
)
def test_a_changed_optimiser_has_its_effect(tiny, key, value, name, expected):
    kind = ("TRAIN.OPTIMIZER.NAME", "sgd" if key == "MOMENTUM" else "adamw")
    saved = tiny(*kind)
    saved.train(1)
    changed = tiny(*kind, f"TRAIN.OPTIMIZER.{key}", value)
    changed.state.load_state_dict(saved.state.state_dict())
    assert [group[name] for group in changed.state.optimizer.param_groups] == [expected] * 2


def test_a_state_of_the_first_version_goes_on(tiny, same):
    whole = tiny("TRAIN.EMA.ENABLE", "True")
    whole.train(13)
    first = tiny("TRAIN.EMA.ENABLE", "True")
    first.train(10)
    first.state.finish_round()
    first.train(2)
    state = first.state.state_dict()
    new = ("recorded", "round_loss", "round_grad_norm", "round_good_steps", "best", "unimproved", "best_weights")
    old = {name: value for name, value in state.items() if name not in new}
    old |= {"epoch": 1, "epoch_loss": state["round_loss"], "epoch_loss_steps": 2}
    old |= {"max_accuracy": 55.0, "max_accuracy_ema": -1.0}
    second = tiny("TRAIN.EMA.ENABLE", "True")
    old["config"] = copy.deepcopy(state["config"])
    old["config"]["TRAIN"]["OPTIMIZER"]["BETAS"] = [0.9, 0.999]  # its default
    old = of_today(old, second.state.config)
    assert not changes(old["config"], second.state.config)
    second.state.load_state_dict(old)
    assert (second.state.recorded, second.state.best) == (10, {"acc1": 55.0})
    assert second.state.mean_loss == first.state.mean_loss
    second.train(1)
    assert same(second.state.state_dict()["model_ema"], whole.state.state_dict()["model_ema"])


def test_betas_that_nobody_chose_are_those_of_the_state(tiny):
    lion = ("TRAIN.OPTIMIZER.NAME", "Lion")
    first, second = tiny(*lion, "TRAIN.OPTIMIZER.BETAS", "[0.9, 0.999]"), tiny("TRAIN.OPTIMIZER.NAME", "lion")
    first.train(1)
    old = first.state.state_dict() | {
        "epoch_loss": 0.0,
        "epoch_loss_steps": 0,
        "max_accuracy": 0,
        "max_accuracy_ema": 0,
    }
    second.state.load_state_dict(of_today(old, second.state.config))
    third = tiny(*lion)
    third.state.load_state_dict(second.state.state_dict())
    for run in (second, third):
        assert run.state.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_an_ema_switched_on_later_starts_from_the_weights(tiny):
    saved = tiny()
    saved.train(2)
    later = tiny("TRAIN.EMA.ENABLE", "True")
    later.state.load_state_dict(saved.state.state_dict())
    assert torch.equal(later.state.ema.module[0].weight, saved.state.model[0].weight)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"model": nn.Linear(4, 3)}, r"'x\.pth' is of another architecture"),
        ({"steps_per_epoch": 20}, r"'x\.pth' is of a run with 20 steps an epoch and this one has 10"),
        ({"opts": ("TRAIN.OPTIMIZER.NAME", "sgd")}, r"'x\.pth' was written with TRAIN\.OPTIMIZER\.NAME sgd"),
        ({"drop_group": True}, r"'x\.pth' has other groups of parameters"),
    ],
)
def test_what_is_not_its_own_is_refused(tiny, other, sentence):
    drop_group = other.pop("drop_group", False)
    saved = tiny(*other.pop("opts", ()), **other).state.state_dict()
    if drop_group:
        saved["optimizer"]["param_groups"].pop()
    with pytest.raises(UserError, match=sentence):
        tiny().state.load_state_dict(saved, "x.pth")


def test_bare_weights_cannot_be_resumed(tiny):
    with pytest.raises(UserError, match="cannot be resumed, it lacks .*--pretrained"):
        tiny().state.load_state_dict({"model": nn.Linear(4, 3).state_dict()}, "x.pth")
