"""On a GPU: the golden numbers, and images of ever other sizes."""

import random

import pytest
import torch

from vmamba.detection.models import create_detector, detector_from_released

from .test_golden import CASES, relative

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products():
    """Without TensorFloat-32, in which cuDNN convolves by default."""
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
        yield


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden_predictions_losses_and_gradients(path):
    golden = torch.load(path, weights_only=True)
    model = detector_from_released(golden["config"], golden["state_dict"]).cuda()
    with torch.no_grad():
        predictions = model(golden["input"].cuda(), golden["image_sizes"])
    for ours, theirs in zip(predictions, golden["predictions"], strict=True):
        assert torch.equal(ours["labels"].cpu(), theirs["labels"])
        assert relative(ours["boxes"].cpu(), theirs["boxes"]) < 1e-4
        assert (ours["masks"].cpu() != theirs["masks"].bool()).float().mean() < 1e-5
    targets = [{name: value.cuda() for name, value in target.items()} for target in golden["targets"]]
    losses = model(golden["input"].cuda(), golden["image_sizes"], targets)
    for name, value in golden["losses"].items():
        torch.testing.assert_close(losses[name].cpu(), value.squeeze(), rtol=1e-4, atol=0)
    sum(value for name, value in losses.items() if "loss" in name).backward()
    for name, gradient in golden["grads"].items():
        ours = model.name_of_head(name).replace("backbone.", "backbone.model.")
        assert relative(model.get_parameter(ours).grad.cpu(), gradient) < 1e-4, name


def test_images_of_other_sizes_compile_nothing_and_leave_nothing(monkeypatch):
    from vmamba_kernels.cuda import compiler

    model = create_detector("mask_rcnn", "vmamba_nano", 5, channels=16, hidden=32).cuda()
    draw, held = random.Random(0), []

    def step():
        size = [draw.randint(33, 300) for _ in range(2)]
        boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0]], device="cuda")
        masks = torch.ones(1, *size, dtype=torch.uint8, device="cuda")
        target = {"boxes": boxes, "labels": torch.zeros(1, dtype=torch.long, device="cuda"), "masks": masks}
        with torch.autocast("cuda", torch.bfloat16):
            losses = model(torch.randn(1, 3, *size, device="cuda"), [size], [target])
        sum(value for name, value in losses.items() if "loss" in name).backward()
        for parameter in model.parameters():
            parameter.grad = None

    for _ in range(3):
        step()
    monkeypatch.setattr(compiler, "compile_cubin", lambda *_: pytest.fail("a kernel was compiled for a size"))
    for _ in range(20):
        step()
        held.append(torch.cuda.memory_allocated())
    assert max(held) - min(held) < 2**20
