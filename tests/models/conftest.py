"""Weights of the small model, and a released file that holds them."""

import logging

import pytest
import torch
from yacs.config import CfgNode

from vmamba.models.released import to_released

from .small import model


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="vmamba")
    logging.getLogger("vmamba").propagate = True
    return lambda: caplog.text


@pytest.fixture(scope="module")
def plain():
    return model().state_dict()


@pytest.fixture(scope="module")
def averaged():
    return model(1).state_dict()


@pytest.fixture
def released(tmp_path, plain, averaged):
    """A file as the original writes it, in the spelling of January, with a real yacs config in it."""
    config = CfgNode({"MODEL": {"TYPE": "vssm", "VSSM": {"DEPTHS": [1, 2]}}, "TRAIN": {"OPTIMIZER": {"BETAS": (0, 1)}}})
    config.freeze()
    content = {
        "model": to_released(model(), january=True),
        "model_ema": to_released(model(1), january=True),
        "optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"t_initial": 3},
        "scaler": {"scale": 65536.0},
        "epoch": 262,
        "max_accuracy": 82.1,
        "max_accuray_ema": 82.5,
        "config": config,
    }
    torch.save(content, tmp_path / "released.pth")
    return tmp_path / "released.pth"
