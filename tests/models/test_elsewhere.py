"""Our backbones in other people's detectors and segmenters, as docs/elsewhere.md shows."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import vmamba
from vmamba.models.backbones import create_backbone
from vmamba.models.released import options_from_released
from vmamba.models.vssm import VSSM

GOLDEN = Path(__file__).parents[1] / "data" / "golden_downstream"


def test_mm_vssm_is_the_released_backbone_under_its_names():
    registry = pytest.importorskip("mmengine.registry")
    import vmamba.models.mm_vssm

    golden = torch.load(GOLDEN / "mask_rcnn_s1.pt", weights_only=True)
    model = registry.MODELS.build({"type": "MM_VSSM", "out_indices": (0, 1, 2, 3), **golden["config"]["backbone"]})
    detector = torch.nn.ModuleDict({"backbone": model})  # as mmdetection's model holds it
    released = {name: weight for name, weight in golden["state_dict"].items() if name.startswith("backbone.")}
    detector.load_state_dict(released)
    assert detector.state_dict().keys() == released.keys()
    assert all(torch.equal(weight, released[name]) for name, weight in detector.state_dict().items())
    ours = vmamba.detector_from_released(golden["config"], golden["state_dict"]).backbone
    with torch.no_grad():
        for mine, theirs in zip(model.eval()(golden["input"]), ours(golden["input"]), strict=True):
            assert torch.equal(mine, theirs)


def test_mm_vssm_starts_from_a_classifiers_weights(tmp_path):
    pytest.importorskip("mmengine")
    from vmamba.models.mm_vssm import MM_VSSM

    options = dict(dims=8, depths=(1, 1, 1, 1), forward_type="v05_noz", ssm_d_state=1)
    classifier = VSSM(**options_from_released(options))
    torch.save(vmamba.to_released(classifier), tmp_path / "w.pth")
    model = MM_VSSM(**options, pretrained=str(tmp_path / "w.pth"))
    model.init_weights()
    weights = model.state_dict()
    assert torch.equal(weights["layers.3.blocks.0.op.in_proj.weight"], classifier.layers[3].blocks[0].op.in_proj.weight)


class Pyramid(torch.nn.Module):
    """What torchvision's detectors call a backbone: named maps of `out_channels` each."""

    def __init__(self, backbone, out_channels=32):
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        self.fpn = FeaturePyramidNetwork(backbone.channels, out_channels)

    def forward(self, images):
        return self.fpn({str(level): each for level, each in enumerate(self.backbone(images))})


def test_in_torchvisions_mask_rcnn():
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = create_backbone("vmamba_nano", dims=8, depths=(1, 1, 1, 1))
    places = ["0", "1", "2", "3"]
    model = MaskRCNN(
        Pyramid(backbone),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(places, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(places, 14, 2),
        min_size=64,
        max_size=96,
    )
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 60, 70, dtype=torch.uint8),
    }
    losses = model([torch.rand(3, 60, 70)], [target])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert {"boxes", "labels", "scores", "masks"} == model.eval()([torch.rand(3, 60, 70)])[0].keys()
