"""Mask R-CNN of the released backbone in mmdetection, run there in float32 on a CPU: the same numbers here."""

from pathlib import Path

import pytest
import torch

from vmamba.detection.models import detector_from_released

CASES = sorted((Path(__file__).parents[1] / "data" / "golden_downstream").glob("mask_rcnn*.pt"))


def relative(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def golden(request):
    return torch.load(request.param, weights_only=True)


@pytest.fixture
def model(golden):
    return detector_from_released(golden["config"], golden["state_dict"])


def test_maps_and_proposals(golden, model):
    with torch.no_grad():
        maps = model.pyramid(golden["input"])
        scores, offsets = model.rpn_head(maps)
        proposals = model.rpn_head.proposals(scores, offsets, golden["image_sizes"], model.proposals)
    for ours, theirs in ((maps, "fpn"), (scores, "rpn_cls"), (offsets, "rpn_reg")):
        assert max(map(relative, ours, golden[theirs])) < 1e-5
    for (boxes, chances), expected in zip(proposals, golden["proposals"], strict=True):
        assert relative(boxes, expected["boxes"]) < 1e-4
        assert relative(chances, expected["scores"]) < 1e-5


def test_predictions_in_the_same_order(golden, model):
    with torch.no_grad():
        predictions = model(golden["input"], golden["image_sizes"])
    for ours, theirs in zip(predictions, golden["predictions"], strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        assert relative(ours["boxes"], theirs["boxes"]) < 1e-4
        assert relative(ours["scores"], theirs["scores"]) < 1e-4
        assert (ours["masks"] != theirs["masks"].bool()).float().mean() < 1e-5  # a pixel may lie on the threshold


def test_losses_and_gradients(golden, model):
    losses = model(golden["input"], golden["image_sizes"], golden["targets"])
    assert losses.keys() == golden["losses"].keys()
    for name, value in golden["losses"].items():
        torch.testing.assert_close(losses[name], value.squeeze(), rtol=1e-4, atol=0)
    sum(value for name, value in losses.items() if "loss" in name).backward()
    errors = {}
    for name, gradient in golden["grads"].items():
        ours = model.name_of_head(name).replace("backbone.", "backbone.model.")
        errors[name] = relative(model.get_parameter(ours).grad, gradient)
    assert len(errors) > 10 and max(errors.values()) < 1e-4, errors
