"""On a GPU: the golden numbers."""

import pytest
import torch

from vmamba.segmentation.models import segmenter_from_released

from .test_golden import CASES, relative

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden_logits_losses_and_gradients(path):
    golden = torch.load(path, weights_only=True)
    model = segmenter_from_released(golden["config"], golden["state_dict"]).cuda()
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):  # cuDNN convolves in TensorFloat-32 else
        with torch.no_grad():
            assert relative(model(golden["input"].cuda()).cpu(), golden["logits_full"]) < 1e-5
        losses = model(golden["input"].cuda(), golden["target"].cuda())
        sum(value for name, value in losses.items() if "loss" in name).backward()
    for name, value in golden["losses"].items():
        torch.testing.assert_close(losses[name].cpu(), value.squeeze(), rtol=1e-5, atol=0)
    for name, gradient in golden["grads"].items():
        ours = model.get_parameter(name.replace("backbone.", "backbone.model.")).grad
        assert relative(ours.cpu(), gradient) < 1e-4, name
