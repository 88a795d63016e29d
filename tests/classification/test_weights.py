"""Released weights in runs: evaluated, started from with their head or a new one, refused where they cannot serve."""

import pytest
import torch
from yacs.config import CfgNode

import vmamba
from vmamba.config import argument_parser, config_from_args, output_folder
from vmamba.errors import UserError
from vmamba.runtime.trainer import run

from .tiny import CLASSES, command, log, saved, tiny_config


def tiny(seed, num_classes=CLASSES):
    torch.manual_seed(seed)
    return vmamba.create_model("vmamba_digits", num_classes=num_classes, depths=(1, 1), dims=8)


@pytest.fixture
def released(tmp_path):
    """A function that writes a file as the original does, of a model with so many classes."""

    def write(num_classes=CLASSES):
        weights = [vmamba.to_released(tiny(seed, num_classes)) for seed in (5, 6)]
        content = {
            "model": weights[0],
            "model_ema": weights[1],
            "optimizer": {},
            "epoch": 3,
            "config": CfgNode({"A": 1}),
        }
        torch.save(content | {"max_accuracy": 50.0, "max_accuray_ema": 60.0}, tmp_path / "released.pth")
        return tmp_path / "released.pth"

    return write


@pytest.mark.parametrize("key", ["MODEL.RESUME", "MODEL.PRETRAINED"])
def test_evaluating_a_released_file_gives_both_weights_or_the_chosen(released, tmp_path, key):
    both = run(tiny_config(tmp_path, "EVAL_MODE", True, key, released()))
    for weights, prefix in (("model", ""), ("ema", "ema_")):
        one = run(tiny_config(tmp_path, "EVAL_MODE", True, key, released(), "MODEL.WEIGHTS", weights))
        assert one == {name: both[prefix + name] for name in ("val_loss", "acc1", "acc5")}
    assert both["val_loss"] != both["ema_val_loss"]


@pytest.mark.parametrize("key", ["MODEL.PRETRAINED", "MODEL.RESUME"])
def test_training_starts_from_the_averaged_weights_of_a_released_file_and_says_so(released, tmp_path, key):
    config = tiny_config(tmp_path, key, released(), "TRAIN.EPOCHS", 0)
    results = run(config)
    expected = run(tiny_config(tmp_path, "EVAL_MODE", True, "MODEL.RESUME", released(), "MODEL.WEIGHTS", "ema"))
    assert results["val_loss"] == results["ema_val_loss"] == expected["val_loss"]
    assert "taking the weights 'model_ema' (epoch 3, 60.00% top-1), not 'model'" in log(config)
    assert "starting from the weights in" in log(config)


def test_the_same_command_goes_on_where_the_run_stands_not_from_the_file_it_started_from(released, tmp_path):
    arguments = ("MODEL.RESUME", released(), "TRAIN.EPOCHS", 1)
    config = tiny_config(tmp_path, *arguments)
    results = run(config)
    weights = saved(config)["model"]
    assert run(tiny_config(tmp_path, *arguments)) == results
    assert "going on from" in log(config) and "instead of" in log(config)
    assert all(torch.equal(weight, weights[name]) for name, weight in saved(config)["model"].items())


def test_another_number_of_classes_needs_a_new_head(released, tmp_path):
    path = released(num_classes=9)
    with pytest.raises(UserError, match=r"classifier\.head\.weight: file \(9, 16\), model \(6, 16\).*--drop-head"):
        run(tiny_config(tmp_path, "MODEL.PRETRAINED", path))
    arguments = command(tmp_path, "--pretrained", str(path), "--drop-head", "--opts", "TRAIN.EPOCHS", "1")[2:]
    config = config_from_args(argument_parser().parse_args(arguments))
    results = run(config)
    assert "dropped the head of 9 classes; the model's head of 6 classes starts at random" in log(config)
    assert saved(config)["model"]["classifier.head.weight"].shape == (CLASSES, 16)
    evaluation = config_from_args(argument_parser().parse_args([*arguments, "--eval"]))  # of the run, not of its start
    assert run(evaluation) == results
    assert output_folder(evaluation) == output_folder(config)
