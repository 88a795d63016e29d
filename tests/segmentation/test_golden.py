"""UperNet of the released backbone in mmsegmentation, run there in float32 on a CPU: the same numbers here."""

from pathlib import Path

import pytest
import torch

from vmamba.segmentation.models import segmenter_from_released

CASES = sorted((Path(__file__).parents[1] / "data" / "golden_downstream").glob("upernet*.pt"))


def relative(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def golden(request):
    return torch.load(request.param, weights_only=True)


def test_logits_losses_and_gradients(golden):
    model = segmenter_from_released(golden["config"], golden["state_dict"])
    with torch.no_grad():
        assert relative(model(golden["input"]), golden["logits_full"]) < 1e-5
        maps = model.backbone(golden["input"])
        assert relative(model.decode_head(maps), golden["logits"]) < 1e-5
        assert relative(model.auxiliary_head(maps[2]), golden["aux_logits"]) < 1e-5
    losses = model(golden["input"], golden["target"])
    assert losses.keys() == golden["losses"].keys()
    for name, value in golden["losses"].items():
        torch.testing.assert_close(losses[name], value.squeeze(), rtol=1e-5, atol=0)
    sum(value for name, value in losses.items() if "loss" in name).backward()
    names = {name: name.replace("backbone.", "backbone.model.") for name in golden["grads"]}
    errors = {
        name: relative(model.get_parameter(names[name]).grad, gradient) for name, gradient in golden["grads"].items()
    }
    assert len(errors) > 10 and max(errors.values()) < 1e-4, errors
