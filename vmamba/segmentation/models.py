"""Segmenters by name, by config, and from released files."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.config import get_config, restored
from vmamba.config.keys import keys_of
from vmamba.errors import UserError, unknown
from vmamba.models.backbones import build_backbone, create_backbone
from vmamba.models.pretrained import Checkpoint, open_checkpoint
from vmamba.models.whole import build_whole, check_config, load_whole, released_backbone, shape_of, variant_of
from vmamba.segmentation.upernet import UperNet

SEGMENTERS = {"upernet": UperNet}
HEAD = "decode_head.conv_seg.weight"  # which the weights of every segmenter have
_AUXILIARY = "auxiliary_head.conv_seg.weight"


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
    if not isinstance(name, str) or name not in SEGMENTERS:
        raise unknown("segmenter", name, SEGMENTERS)
    stages = partial(create_backbone, backbone, pretrained_backbone, **(backbone_options or {}))
    return _built(SEGMENTERS[name], stages, num_classes, options)


def _built(
    kind: type[UperNet], backbone: Callable[[], nn.Module], num_classes: int, options: Mapping[str, Any]
) -> UperNet:
    model = build_whole(kind, backbone, num_classes, options)
    if "ignore_index" not in options and num_classes > model.ignore_index:
        raise UserError(
            f"num_classes is {num_classes}, and label {model.ignore_index}, of one of them, would not count; give "
            f"another ignore_index, such as -1"
        )
    return model


def build_model(config: CfgNode) -> UperNet:
    """The segmenter of a config, random weights."""
    options = config.MODEL
    return SEGMENTERS[options.SEGMENTER](
        build_backbone(config),
        options.NUM_CLASSES,
        channels=options.CHANNELS,
        aux_channels=options.AUX_CHANNELS,
        aux_weight=options.AUX_WEIGHT,
        ignore_index=config.DATA.IGNORE_INDEX,
        dropout=options.DROPOUT,
        init_std=options.INIT_STD,
    )


def load_segmenter(path_or_url: str | Path, weights: str = "auto") -> UperNet:
    """The segmenter of a file, or of an address, with its weights, in eval mode.

    Args:
        path_or_url: of a run of ours, which says what it is; or of mmsegmentation with one of our models by name as the
            backbone, such as the released ones.
        weights: as of `vmamba.load_checkpoint`.

    Raises UserError when the file cannot be read or is of another model.
    """
    checkpoint = open_checkpoint(path_or_url, weights)
    model = build_model(config_of(checkpoint))
    load_whole(model, checkpoint.whole, checkpoint.path)
    return model.eval()


def config_of(checkpoint: Checkpoint) -> CfgNode:
    """The config of a run in its checkpoint, or what the weights of a released file tell.

    Raises UserError where they are of no segmenter on one of our models.
    """
    held = checkpoint.whole
    if checkpoint.config.get("TASK") == "segmentation":
        return restored(checkpoint.config, f"the config in '{checkpoint.path}'")
    if HEAD not in held:
        raise UserError(f"'{checkpoint.path}' holds no segmenter: it has no {HEAD}")
    most = keys_of("segmentation")["MODEL.NUM_CLASSES"].takes.at_most
    classes, channels, *_ = shape_of(held, HEAD, 4, checkpoint.path, rows=(1, most))
    head = ["MODEL.NUM_CLASSES", classes, "MODEL.CHANNELS", channels]
    if _AUXILIARY in held:
        head += ["MODEL.AUX_CHANNELS", shape_of(held, _AUXILIARY, 4, checkpoint.path)[1]]
    return get_config(None, ["TASK", "segmentation", "MODEL.NAME", variant_of(held, checkpoint.path), *head])


def segmenter_from_released(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UperNet:
    """A segmenter with released weights, in eval mode.

    Args:
        config: `backbone`, the released backbone's options; `num_classes`; `channels`, `aux_channels` and
            `pool_scales` of the heads and `ignore_index`, mmsegmentation's defaults where absent; `size`, of images,
            says nothing of the model.
        state_dict: in either spelling, as mmsegmentation names it.

    Raises UserError for unknown options, and for weights that do not fit, listing how.
    """
    known = ("channels", "aux_channels", "pool_scales", "ignore_index")
    check_config(config, "the config", ("backbone", "num_classes"), (*known, "size"))
    options = {name: config[name] for name in known if name in config}
    model = _built(UperNet, partial(released_backbone, config["backbone"], state_dict), config["num_classes"], options)
    load_whole(model, state_dict, "the state dict")
    return model.eval()
