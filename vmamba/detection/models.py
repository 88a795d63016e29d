"""Detectors by name, by config, and from released files."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from yacs.config import CfgNode

from vmamba.config import get_config, restored
from vmamba.detection.mask_rcnn import MaskRCNN
from vmamba.detection.roi_heads import PredictionSettings
from vmamba.detection.rpn import ProposalSettings
from vmamba.errors import UserError, unknown
from vmamba.models.backbones import build_backbone, create_backbone
from vmamba.models.pretrained import Checkpoint, open_checkpoint
from vmamba.models.whole import build_whole, check_config, load_whole, released_backbone, shape_of, variant_of
from vmamba.values import Takes

DETECTORS = {"mask_rcnn": MaskRCNN}
HEAD = "roi_head.bbox_head.fc_cls.weight"  # which the weights of every detector have
_EVERY = 1 << 40  # more boxes than there are


def create_detector(
    name: str,
    backbone: str = "vmamba_tiny",
    num_classes: int = 80,
    pretrained_backbone: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> MaskRCNN:
    """A detector: see `MaskRCNN`, which says how it is called.

    Args:
        name: "mask_rcnn".
        backbone: of our models or timm's; see `vmamba.models.backbones.create_backbone`.
        pretrained_backbone: with the weights that its authors trained on ImageNet.
        backbone_options: of the backbone, such as drop_path_rate.
        options: of `MaskRCNN`.

    Raises UserError for a name or option that is unknown, and for weights that cannot be had.
    """
    if not isinstance(name, str) or name not in DETECTORS:
        raise unknown("detector", name, DETECTORS)
    stages = partial(create_backbone, backbone, pretrained_backbone, **(backbone_options or {}))
    return build_whole(DETECTORS[name], stages, num_classes, options)


def build_model(config: CfgNode) -> MaskRCNN:
    """The detector of a config, random weights."""
    options, test = config.MODEL, config.TEST
    training, testing = options.PROPOSALS
    return DETECTORS[options.DETECTOR](
        build_backbone(config),
        options.NUM_CLASSES,
        channels=options.CHANNELS,
        hidden=options.HIDDEN,
        training_proposals=ProposalSettings(nms_pre=2 * training, max_per_img=training),
        proposals=ProposalSettings(nms_pre=testing, max_per_img=testing),
        predictions=PredictionSettings(test.SCORE, test.NMS, test.MOST),
        rpn_samples=options.RPN_SAMPLES,
        samples=options.SAMPLES,
    )


def load_detector(path_or_url: str | Path, weights: str = "auto") -> MaskRCNN:
    """The detector of a file, or of an address, with its weights, in eval mode.

    Args:
        path_or_url: of a run of ours, which says what it is; or of mmdetection with one of our models by name as the
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

    Raises UserError where they are of no detector on one of our models.
    """
    held = checkpoint.whole
    if checkpoint.config.get("TASK") == "detection":
        return restored(checkpoint.config, f"the config in '{checkpoint.path}'")
    if HEAD not in held:
        raise UserError(f"'{checkpoint.path}' holds no detector: it has no {HEAD}")
    rows, hidden = shape_of(held, HEAD, 2, checkpoint.path, rows=(2, 10**6))  # a class and the background
    channels, *_ = shape_of(held, "rpn_head.rpn_conv.weight", 4, checkpoint.path)
    head = ["MODEL.NUM_CLASSES", rows - 1, "MODEL.CHANNELS", channels, "MODEL.HIDDEN", hidden]
    return get_config(None, ["TASK", "detection", "MODEL.NAME", variant_of(held, checkpoint.path), *head])


def detector_from_released(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MaskRCNN:
    """A detector with released weights, in eval mode.

    Args:
        config: `backbone`, the released backbone's options; `num_classes`; `fpn_channels` and `fc_channels` of neck
            and heads; `train` and `test`, fields of `ProposalSettings` and `PredictionSettings`.  In training
            `rpn_samples` and `samples` boxes an image are drawn; where `train` has none of them, all count.
        state_dict: in either spelling, as mmdetection names it.

    Raises UserError for unknown options, and for weights that do not fit, listing how.
    """
    heads = {"fpn_channels": "channels", "fc_channels": "hidden"}
    check_config(config, "the config", ("backbone", "num_classes"), (*heads, "train", "test"))
    train, test = config.get("train", {}), config.get("test", {})
    proposals, predictions = (_takes(kind) for kind in (ProposalSettings, PredictionSettings))
    samples = dict.fromkeys(("rpn_samples", "samples"), MaskRCNN.takes["samples"])
    check_config(train, "train of the config", (), proposals | samples)
    check_config(test, "test of the config", (), proposals | predictions)
    options = {ours: config[name] for name, ours in heads.items() if name in config}
    options |= dict.fromkeys(samples, _EVERY) | {name: train[name] for name in samples if name in train}
    options["training_proposals"] = ProposalSettings(**_checked(proposals, train))
    options["proposals"] = ProposalSettings(**_checked(proposals, test))
    options["predictions"] = PredictionSettings(**_checked(predictions, test))
    backbone = partial(released_backbone, config["backbone"], state_dict)
    model = build_whole(MaskRCNN, backbone, config["num_classes"], options)
    load_whole(model, state_dict, "the state dict")
    return model.eval()


def _takes(settings: type) -> dict[str, Takes]:
    """What the fields of `settings` take: numbers of boxes, and shares."""
    return {
        each.name: Takes((each.type,), at_least=0, at_most=None if each.type is int else 1) for each in fields(settings)
    }


def _checked(takes: Mapping[str, Takes], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each.check(name, given[name]) for name, each in takes.items() if name in given}
