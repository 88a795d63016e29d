"""Weights & Biases, where a config names a project there."""

import sys
from types import SimpleNamespace

import pytest

from vmamba.errors import UserError
from vmamba.runtime import records
from vmamba.runtime.trainer import run

from .tiny import log, metrics, tiny_config


@pytest.fixture
def wandb(monkeypatch):
    """What is asked of the package."""
    asked = SimpleNamespace(inits=[], logged=[], finished=0, broken=False)

    class Online:
        def log(self, numbers, step):
            if asked.broken:
                raise ConnectionError("no network")
            asked.logged.append((step, numbers))

        def finish(self):
            asked.finished += 1

    module = SimpleNamespace(init=lambda **options: asked.inits.append(options) or Online())
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(records, "find_spec", lambda name: name)
    monkeypatch.setattr(records.Records, "draw", lambda self: None)  # which takes half a second
    return asked


def test_numbers_go_to_weights_and_biases_too(tmp_path, wandb):
    config = tiny_config(tmp_path, "WANDB", "my project", "TRAIN.EPOCHS", 1)
    run(config)
    (given,) = wandb.inits
    assert (given["project"], given["name"], given["resume"]) == ("my project", "tiny/default", "allow")
    assert given["config"]["TRAIN"]["BASE_LR"] == 0.1
    by_step = [step for step, numbers in wandb.logged if "train/loss" in numbers]
    assert by_step == [1, 2, 3] and wandb.finished == 1
    assert wandb.logged[-1] == (3, {f"eval/{name}": metrics(config)[-1][name] for name in RESULTS})
    run(tiny_config(tmp_path, "WANDB", "my project", "TRAIN.EPOCHS", 2))
    assert [each["id"] for each in wandb.inits] == [given["id"]] * 2  # goes on there
    run(tiny_config(tmp_path, "WANDB", "my project", "TRAIN.EPOCHS", 1, "TAG", "other"))
    assert wandb.inits[-1]["id"] != given["id"]
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TAG", "quiet"))
    assert len(wandb.inits) == 3


RESULTS = [f"{kind}{name}" for kind in ("", "ema_") for name in ("val_loss", "acc1", "acc5")]


def test_what_is_not_sent_ends_no_run(tmp_path, wandb):
    wandb.broken = True
    config = tiny_config(tmp_path, "WANDB", "x", "TRAIN.EPOCHS", 1)
    run(config)
    assert "cannot record Weights & Biases' events in" in log(config) and len(metrics(config)) == 1


def test_a_package_that_is_missing_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="WANDB is 'x', and the package wandb is not installed; pip install wandb"):
        run(tiny_config(tmp_path, "WANDB", "x"))
