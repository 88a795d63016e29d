"""Grad-CAM: against its formula, and the sentence where the package is missing."""

import sys

import pytest
import torch

from vmamba import create_model
from vmamba.analysis.gradcam import class_map, gradcam
from vmamba.errors import UserError


def test_a_map_is_the_channels_weighted_by_their_mean_gradients():
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed; pip install -e '.[analysis]'")
    torch.manual_seed(0)
    model = create_model("vmamba_digits", num_classes=10, in_chans=1).eval()
    images = torch.randn(1, 1, 32, 32)
    seen = []
    handle = model.layers[0].blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    logit = model(images)[0, 3]
    handle.remove()
    (gradient,) = torch.autograd.grad(logit, seen)
    expected = (seen[0] * gradient.mean((1, 2), keepdim=True)).sum(-1).relu()[0].detach()  # (8, 8)
    found = class_map(model, "0.1", images, 3)
    assert found.shape == (32, 32)
    assert found.min() >= 0
    assert found.max() <= 1
    coarse = torch.nn.functional.interpolate(found[None, None], (8, 8), mode="area")[0, 0]
    assert torch.corrcoef(torch.stack([coarse.flatten(), expected.flatten()]))[0, 1] > 0.95


def test_the_door_writes_figure_and_maps(digits_run, tmp_path):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed; pip install -e '.[analysis]'")
    weights = str(digits_run / "best.pth")
    settings = dict(size=32, layers=["0.0", "1.1"], device="cpu", output=str(tmp_path))
    maps = gradcam(model="vmamba_digits", weights=weights, **settings)
    assert maps.shape == (2, 32, 32)
    assert torch.equal(torch.load(tmp_path / "gradcam.pt"), maps)
    for kind in ("pdf", "png"):
        assert (tmp_path / f"gradcam.{kind}").stat().st_size > 1000


def test_a_class_that_is_not_there_is_named(digits_run, tmp_path):
    with pytest.raises(UserError, match="no class 10; this model has classes 0 to 9"):
        gradcam(model="vmamba_digits", weights=str(digits_run / "best.pth"), size=32, target=10, device="cpu")


def test_the_blocks_are_those_of_our_models(tmp_path):
    settings = dict(size=32, device="cpu", output=str(tmp_path))
    with pytest.raises(UserError, match="ResNet is none of our models, whose blocks are drawn; name one of vmamba"):
        gradcam(model="resnet10t", **settings)
    with pytest.raises(UserError, match=r"no layer '2.0'; this model has 0.0 to 0.1, 1.0 to 1.1"):
        gradcam(model="vmamba_digits", layers=["2.0"], **settings)


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(UserError, match="needs the package grad-cam"):
        class_map(create_model("vmamba_digits"), "0.0", torch.zeros(1, 3, 32, 32), 0)
