"""Models of the released implementation, run there in float32 on a CPU: the same numbers here."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vmamba.models.released import from_released, keys_from_released, to_released

CASES = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.pt"))


def relative(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def golden(request):
    return torch.load(request.param, weights_only=True)


def test_logits_loss_and_every_gradient(golden):
    model = from_released(golden["config"], golden["state_dict"])
    images = golden["input"].requires_grad_()
    logits = model(images)
    loss = F.cross_entropy(logits, golden["target"])
    loss.backward()
    assert relative(logits, golden["logits"]) < 1e-5
    assert relative(loss, golden["loss"]) < 1e-5
    assert relative(images.grad, golden["grad_input"]) < 1e-4
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = {
        name: relative(gradients[name], gradient) for name, gradient in keys_from_released(golden["grads"]).items()
    }
    assert len(errors) > 10 and max(errors.values()) < 1e-4, errors


def test_features_of_the_backbone(golden):
    stages = range(len(golden["features"]))
    backbone = from_released(golden["config"], golden["state_dict"] | golden["outnorm_state_dict"], features=stages)
    with torch.no_grad():
        features = backbone(golden["input"])
    assert [f.shape for f in features] == [f.shape for f in golden["features"]]
    assert max(map(relative, features, golden["features"])) < 1e-5
    last = from_released(golden["config"], golden["state_dict"] | golden["outnorm_state_dict"], features=stages[-1:])
    with torch.no_grad():
        torch.testing.assert_close(last(golden["input"])[0], features[-1])
    names = {*golden["state_dict"], *golden["outnorm_state_dict"]} - {"pos_embed"}
    assert to_released(backbone).keys() == {name for name in names if not name.startswith("classifier.")}


def test_written_back_the_weights_are_the_released_ones(golden):
    written = to_released(from_released(golden["config"], golden["state_dict"]))
    assert written.keys() == golden["state_dict"].keys()
    assert all(torch.equal(written[name], weight) for name, weight in golden["state_dict"].items())
