"""Backbones of timm's for detectors and segmenters: what they are padded by, and those that cannot be any."""

import pytest
import torch
from torch.nn import functional as F

from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models.backbones import build_backbone, create_backbone

SIZES = [(64, 96), (75, 61), (36, 68), (1, 300), (1, 1)]


@pytest.mark.parametrize(
    ("name", "multiple", "least"),
    [
        ("swin_tiny_patch4_window7_224", 4, 4),
        ("resnet18", 4, 4),
        ("convnext_atto", 4, 32),
        ("hrnet_w18_small", 32, 32),
        ("nextvit_small", 4, 32),
    ],
)
def test_images_of_any_size_are_padded_as_far_as_the_model_needs_and_no_further(name, multiple, least):
    torch.manual_seed(0)
    backbone = create_backbone(name).eval()
    for size in SIZES:
        images = torch.randn(1, 3, *size)
        padded = [max(least, -(-side // multiple) * multiple) for side in size]
        with torch.no_grad():
            maps = backbone(images)
            alone = backbone.model(F.pad(images, (0, padded[1] - size[1], 0, padded[0] - size[0])))
        for level, (map_, whole) in enumerate(zip(maps, alone, strict=True)):
            stride = 4 * 2**level
            for side, pixels in zip(map_.shape[2:], size, strict=True):
                assert max(1, pixels // stride) <= side <= -(-pixels // stride)
            whole = whole[..., : map_.shape[2], : map_.shape[3]]
            norm = backbone.get_submodule(f"outnorm{level}")
            assert torch.equal(map_, norm(whole.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("maxvit_nano_rw_256", {}, "'maxvit_nano_rw_256' takes images of a size of its own alone, .* another backbone"),
        ("coat_tiny", {}, "'coat_tiny' takes images of a size of its own alone"),
        ("hiera_tiny_224", {}, "'hiera_tiny_224' takes images of a size of its own alone"),
        ("vit_tiny_patch16_224", {}, "gives no feature maps of strides 4, 8, 16, 32: its are of 16, "),
        ("hrnet_w18_small", {"drop_path_rate": 0.1}, "no option drop_path_rate; set MODEL.DROP_PATH_RATE null"),
        ("resnet18", {"foo": 1}, "timm's 'resnet18' has no option foo; leave it out"),
        ("resnet18", {"output_stride": 5}, "timm cannot build 'resnet18' as a backbone: "),
    ],
)
def test_models_that_are_no_backbone_are_told_when_they_are_made(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        create_backbone(name, **options)


def test_recomputation_that_a_model_does_not_have_is_named():
    given = ["TASK", "segmentation", "MODEL.NAME", "timm/hrnet_w18_small", "TRAIN.USE_CHECKPOINT", True]
    with pytest.raises(UserError, match="TRAIN.USE_CHECKPOINT is true, and timm.s timm/hrnet_w18_small has no such"):
        build_backbone(get_config(None, given))
