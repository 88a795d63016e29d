"""Detectors by name, by config, and from released files."""

from collections.abc import Mapping
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
from vmamba.models.whole import build_whole, load_whole, released_backbone, variant_of

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
    if name not in DETECTORS:
        raise unknown("detector", name, DETECTORS)
    stages = create_backbone(backbone, pretrained_backbone, **(backbone_options or {}))
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
        return restored(checkpoint.config)
    if HEAD not in held:
        raise UserError(f"'{checkpoint.path}' holds no detector: it has no {HEAD}")
    classes, hidden = held[HEAD].shape
    head = ["MODEL.NUM_CLASSES", classes - 1, "MODEL.CHANNELS", len(held["rpn_head.rpn_conv.weight"])]
    name = variant_of(held, checkpoint.path)
    return get_config(None, ["TASK", "detection", "MODEL.NAME", name, *head, "MODEL.HIDDEN", hidden])


def detector_from_released(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MaskRCNN:
    """A detector with released weights, in eval mode.

    Args:
        config: `backbone`, the released backbone's options; `num_classes`; `fpn_channels` and `fc_channels` of neck
            and heads; `train` and `test`, fields of `ProposalSettings` and `PredictionSettings`.  In training
            `rpn_samples` and `samples` boxes an image are drawn; where `train` has none of them, all count.
        state_dict: in either spelling, as mmdetection names it.

    Raises UserError for unknown options, and for weights that do not fit, listing how.
    """
    train, test = config.get("train", {}), config.get("test", {})
    model = MaskRCNN(
        released_backbone(config["backbone"], state_dict),
        config["num_classes"],
        config.get("fpn_channels", 256),
        config.get("fc_channels", 1024),
        _settings(ProposalSettings, train),
        _settings(ProposalSettings, test),
        _settings(PredictionSettings, test),
        train.get("rpn_samples", _EVERY),
        train.get("samples", _EVERY),
    )
    load_whole(model, state_dict, "the state dict")
    return model.eval()


def _settings(kind: type, given: Mapping[str, Any]) -> Any:
    return kind(**{name: given[name] for name in kind.__dataclass_fields__ if name in given})
