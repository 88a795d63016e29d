"""Segmenters by name, by config, and from released files."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vmamba.errors import unknown
from vmamba.models.backbones import create_backbone
from vmamba.models.whole import build_whole, load_whole, released_backbone
from vmamba.segmentation.upernet import UperNet

SEGMENTERS = {"upernet": UperNet}


def create_segmenter(
    name: str,
    backbone: str = "vmamba_tiny",
    num_classes: int = 150,
    pretrained_backbone: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> UperNet:
    """A segmenter: images (B, 3, H, W) -> logits (B, num_classes, H, W); see `UperNet`.

    Args:
        name: "upernet".
        backbone: of our models or timm's; see `vmamba.models.backbones.create_backbone`.
        pretrained_backbone: with the weights that its authors trained on ImageNet.
        backbone_options: of the backbone, such as drop_path_rate.
        options: of `UperNet`.

    Raises UserError for a name or option that is unknown, and for weights that cannot be had.
    """
    if name not in SEGMENTERS:
        raise unknown("segmenter", name, SEGMENTERS)
    stages = create_backbone(backbone, pretrained_backbone, **(backbone_options or {}))
    return build_whole(SEGMENTERS[name], stages, num_classes, options)


def segmenter_from_released(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UperNet:
    """A segmenter with released weights, in eval mode.

    Args:
        config: `backbone`, the released backbone's options; `num_classes`; `channels`, `aux_channels` and
            `pool_scales` of the heads, mmsegmentation's defaults where absent.
        state_dict: in either spelling, as mmsegmentation names it.

    Raises UserError for unknown options, and for weights that do not fit, listing how.
    """
    known = ("channels", "aux_channels", "pool_scales")
    options = {name: config[name] for name in known if name in config}
    model = UperNet(released_backbone(config["backbone"], state_dict), config["num_classes"], **options)
    load_whole(model, state_dict, "the state dict")
    return model.eval()
