"""Backbones by name, for detectors and segmenters: our models, and any of timm's that have feature maps."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.layers import Format
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.layers import LayerNorm
from vmamba.models.options import check_configured
from vmamba.models.variants import VARIANTS, create_model
from vmamba.text import some

STRIDES = (4, 8, 16, 32)
_TIMM = "timm/"


def create_backbone(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """A model whose call gives (B, 3, H, W) -> four maps (B, channels, H / stride, W / stride), strides 4, 8, 16, 32.

    Its `channels` are theirs.

    Args:
        name: of our models (`vmamba.list_models()`), or of timm's, with or without "timm/" in front.
        pretrained: with the weights that its authors trained on ImageNet.
        options: of the model; `drop_path_rate` is of both kinds.

    Raises UserError for a name or option that is unknown, for weights that cannot be had, and for a model without four
    such maps.
    """
    if name in VARIANTS:
        return Backbone(create_model(name, pretrained, **options))
    return TimmBackbone(name.removeprefix(_TIMM), pretrained, **options)


def build_backbone(config: CfgNode) -> nn.Module:
    """The backbone of a config: MODEL.NAME with its options, random weights.

    Raises UserError as `create_backbone` does, and for options of our models where the model is timm's.
    """
    settings = config.MODEL
    drop_path = {} if settings.DROP_PATH_RATE is None else {"drop_path_rate": settings.DROP_PATH_RATE}
    if settings.NAME in VARIANTS:
        options = {name: check_configured(name, value) for name, value in settings.OPTIONS.items()}
        given = {"in_chans": settings.IN_CHANS, "backend": settings.BACKEND}
        backbone = create_backbone(settings.NAME, **given, **options, **drop_path)
    elif settings.OPTIONS:
        raise UserError(f"MODEL.OPTIONS are of our models, and MODEL.NAME is {settings.NAME}; leave them out")
    else:
        backbone = create_backbone(settings.NAME, in_chans=settings.IN_CHANS, **drop_path)
    backbone.model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return backbone


class TimmBackbone(nn.Module):
    """Feature maps of a model of timm.

    A model whose stages end without a norm (its stream is normed by the next block alone: Swin, ConvNeXt, ...) gets a
    LayerNorm behind each, as in the detectors of their papers; a model with batch norms needs none.
    """

    def __init__(self, name: str, pretrained: bool = False, **options: Any):
        super().__init__()
        if not timm.is_model(name):
            raise unknown("model", name, [*VARIANTS, *timm.list_models()])
        # Swin's of timm are of one size of image unless told otherwise; the other models do not know the option.
        sizes = {"strict_img_size": False} if name.startswith("swin") else {}
        self.name, self.options = name, sizes | options
        create = partial(timm.create_model, name, features_only=True, **self.options)
        try:
            every = create().feature_info.reduction()
            stages = [len(every) - 1 - every[::-1].index(stride) for stride in STRIDES]
            self.model = create(pretrained=pretrained, out_indices=stages)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"timm's '{name}' gives no feature maps of strides {', '.join(map(str, STRIDES))}: {error}"
            ) from error
        self.channels: list[int] = self.model.feature_info.channels()
        self.channels_last = getattr(self.model, "output_fmt", None) == Format.NHWC
        batch_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())
        for stage, dim in enumerate(self.channels):
            self.add_module(f"outnorm{stage}", nn.Identity() if batch_norms else LayerNorm(dim, keep_float32=True))

    def start_from(self, path: str | Path) -> None:
        """Take over the weights of a file of the whole model, timm's or its authors', without its classifier.

        Raises UserError, loading nothing, when it is of another model.
        """
        whole = timm.create_model(self.name, **self.options)
        filtered = getattr(sys.modules[timm.model_entrypoint(self.name).__module__], "checkpoint_filter_fn", None)
        weights = timm.models.load_state_dict(str(path))
        classifier = whole.default_cfg["classifier"]
        try:
            weights = filtered(weights, whole) if filtered else weights
            kept = {name: weight for name, weight in weights.items() if not name.startswith(classifier)}
            found = whole.load_state_dict(kept, strict=False)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"'{path}' is no file of weights of timm's '{self.name}': {error}") from error
        missing = [name for name in found.missing_keys if not name.startswith(classifier)]
        if missing or found.unexpected_keys:
            raise UserError(
                f"'{path}' is no file of weights of timm's '{self.name}': it lacks {some(missing)}, and has "
                f"{some(found.unexpected_keys)} too many"
            )
        held = whole.state_dict()
        known = dict(held)  # and as timm names the parts of a model with features_only
        for name, weight in held.items():
            known[f"model.{name}"] = known[re.sub(r"\.(\d+)", r"_\1", name, count=1)] = weight
        self.model.load_state_dict({name: known[name] for name in self.model.state_dict()})

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, channels, H', W').

        Zeros at the right and bottom make the sides multiples of 4, which Swin's patches need.
        """
        maps = self.model(F.pad(images, (0, -images.shape[3] % STRIDES[0], 0, -images.shape[2] % STRIDES[0])))
        if not self.channels_last:
            maps = [each.permute(0, 2, 3, 1) for each in maps]
        return [self.get_submodule(f"outnorm{stage}")(each).permute(0, 3, 1, 2) for stage, each in enumerate(maps)]
