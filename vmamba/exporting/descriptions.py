"""What a file tells of its model: a config as in the checkpoints of runs, which `load_model` and its like build it of.

What training alone reads, such as a threshold of a detector's proposals then, is not told.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn
from yacs.config import CfgNode

from vmamba.config import restored
from vmamba.detection.mask_rcnn import MaskRCNN
from vmamba.detection.roi_heads import PredictionSettings
from vmamba.detection.rpn import ProposalSettings
from vmamba.errors import UserError
from vmamba.models.backbone import Backbone
from vmamba.models.backbones import TimmBackbone
from vmamba.models.options import CONFIGURABLE
from vmamba.models.pretrained import channels_of
from vmamba.models.variants import TIMM, VARIANTS, build_model, timm_settings
from vmamba.models.vssm import VSSM
from vmamba.segmentation.upernet import UperNet

# What a run's config says of how its model is asked, beside the images' mean and deviation.
_ASKED = {"DATA": ("SCALE", "DIVISOR", "CROP_SIZE"), "TEST": ("MODE", "STRIDE", "SCALES", "FLIP")}


def timm_name(model: nn.Module) -> str:
    """What timm calls a classifier that its create_model made; "" of another model."""
    told = getattr(model, "pretrained_cfg", None)
    name = told.get("architecture") if isinstance(told, Mapping) else None
    classifies = not isinstance(model, VSSM) and hasattr(model, "num_classes")
    return name if classifies and name and timm.is_model(name) else ""


def size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images of a classifier that takes no others; None of one that takes several."""
    if isinstance(model, VSSM):
        sides = None if model.pos_embed is None else [side * model.patch_size for side in model.pos_embed.shape[2:]]
    else:
        fixed = timm_settings(timm_name(model)).fixed_input_size
        sides = getattr(getattr(model, "patch_embed", None), "img_size", None) if fixed else None
    return sides and tuple(sides)


def described(model: nn.Module, size: Sequence[int] = (224, 224)) -> dict[str, Any] | None:
    """The config that builds `model`: TASK, MODEL and what belongs to it of DATA and TEST; None for a backbone.

    Args:
        size: of the images, which some of timm's models are built for.

    Raises UserError for a classifier, detector or segmenter that no config builds, and what of it.
    """
    if isinstance(model, VSSM):
        return _classifier(model)
    if timm_name(model):
        return _timm_classifier(model, size)
    if not isinstance(model, (UperNet, MaskRCNN)):
        return None
    told = _segmenter(model) if isinstance(model, UperNet) else _detector(model)
    run = getattr(model, "config", None)
    if isinstance(run, CfgNode) and told["TASK"] == run.TASK:
        for section, names in _ASKED.items():
            asked = {name: _plain(run[section][name]) for name in names if name in run[section]}
            told[section] = asked | told.get(section, {})
    try:
        restored(told)
    except UserError as error:
        raise beyond(str(error)) from error
    return told


def _classifier(model: VSSM) -> dict[str, Any]:
    if model.global_pool != "avg":
        raise beyond("global_pool is '', and the model of a config pools")
    return {"TASK": "classification", "MODEL": _variant(model) | {"NUM_CLASSES": model.num_classes}}


def _timm_classifier(model: nn.Module, size: Sequence[int]) -> dict[str, Any]:
    """Raises UserError where timm's model of that name is another one."""
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    told = {"NAME": f"{TIMM}{timm_name(model)}", "NUM_CLASSES": model.num_classes, "IN_CHANS": channels_of(model)}
    told |= {"DROP_PATH_RATE": max(rates)} if rates else {}
    config = {"TASK": "classification", "MODEL": told, "DATA": {"IMG_SIZE": list(size_of(model) or size)}}
    with torch.random.fork_rng(devices=[]):
        anew = build_model(restored(config))
    if _shapes(anew) != _shapes(model) or _layers(anew) != _layers(model):
        raise beyond(f"its layers are not those of timm's {timm_name(model)}, and a config has no options of these")
    return config


def _layers(model: nn.Module) -> list[str]:
    """What PyTorch prints of them, but for those of training alone, and how the model pools."""
    printed = [line for line in str(model).splitlines() if not re.search(r"\): (DropPath|Dropout|Identity)\(", line)]
    return [*printed, str(getattr(model, "global_pool", ""))]


def _segmenter(model: UperNet) -> dict[str, Any]:
    head = model.decode_head
    scales, usual = tuple(pool.side for pool, _ in head.psp_modules), _default(UperNet, "pool_scales")
    if scales != usual:
        raise beyond(f"pool_scales is {scales}, and that of a config's model {usual}")
    heads = {
        "SEGMENTER": "upernet",
        "NUM_CLASSES": model.num_classes,
        "CHANNELS": head.conv_seg.in_channels,
        "AUX_CHANNELS": model.auxiliary_head.conv_seg.in_channels,
        "AUX_WEIGHT": model.aux_weight,
        "DROPOUT": head.dropout.p,
    }
    data = {"IGNORE_INDEX": model.ignore_index}
    return {"TASK": "segmentation", "MODEL": _backbone(model.backbone) | heads, "DATA": data}


def _detector(model: MaskRCNN) -> dict[str, Any]:
    training, testing = model.training_proposals.max_per_img, model.proposals.max_per_img
    test = {"SCORE": model.predictions.score_thr, "NMS": model.predictions.nms, "MOST": model.predictions.max_dets}
    for name, built in {  # as `detection.models.build_model` makes them
        "proposals": ProposalSettings(nms_pre=testing, max_per_img=testing),
        "predictions": PredictionSettings(*test.values()),
    }.items():
        if getattr(model, name) != built:
            raise beyond(f"{name} is {getattr(model, name)}, and the nearest of a config {built}")
    heads = {
        "DETECTOR": "mask_rcnn",
        "NUM_CLASSES": model.num_classes,
        "CHANNELS": model.rpn_head.rpn_conv.out_channels,
        "HIDDEN": model.roi_head.bbox_head.fc_cls.in_features,
        "RPN_SAMPLES": model.rpn_head.samples,
        "SAMPLES": model.roi_head.samples,
        "PROPOSALS": [training, testing],
    }
    return {"TASK": "detection", "MODEL": _backbone(model.backbone) | heads, "TEST": test}


def _backbone(backbone: nn.Module) -> dict[str, Any]:
    if isinstance(backbone, TimmBackbone):
        own = {"in_chans": "IN_CHANS", "drop_path_rate": "DROP_PATH_RATE"}
        for name, value in backbone.options.items():
            if name not in {*own, "strict_img_size"}:
                raise beyond(f"{name} of its backbone is {value!r:.60}, and a config has no options of timm's models")
        told = {own[name]: value for name, value in backbone.options.items() if name in own}
        return {"NAME": f"{TIMM}{backbone.name}"} | told
    if not isinstance(backbone, Backbone):
        raise beyond(f"its backbone is a {type(backbone).__name__}")
    if list(backbone.out_indices) != [0, 1, 2, 3] or backbone.stages != 4:
        raise beyond(f"its backbone gives the stages {list(backbone.out_indices)} of {backbone.stages}")
    return _variant(backbone.model)


def _variant(model: VSSM) -> dict[str, Any]:
    """The variant that has most of the model's options, and those that it has otherwise.

    Raises UserError where a model of these options has other weights than `model`, which was changed since.
    """
    given = {name: _plain(getattr(model.options, name)) for name in CONFIGURABLE}
    differing = {}
    for name, variant in VARIANTS.items():
        own = {option: _plain(variant.options.get(option, _default(VSSM, option))) for option in given}
        differing[name] = {option: value for option, value in given.items() if value != own[option]}
    name = min(differing, key=lambda each: len(differing[each]))
    with torch.device("meta"):
        anew = VSSM(**given, num_classes=model.num_classes, in_chans=model.in_chans, img_size=model.options.img_size)
    if model.classifier is None:
        anew.classifier = None
    if _shapes(anew) != _shapes(model):
        raise beyond("its layers are no longer those that its options make")
    drop_path_rate = model.options.drop_path_rate
    return {"NAME": name, "IN_CHANS": model.in_chans, "DROP_PATH_RATE": drop_path_rate, "OPTIONS": differing[name]}


def _default(kind: type[nn.Module], option: str) -> Any:
    return inspect.signature(kind).parameters[option].default


def beyond(what: str) -> UserError:
    return UserError(
        f"no file could tell what this model is: {what}; save its weights alone, with torch.save(model.state_dict(), "
        f"path)"
    )


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
