"""Backbones by name, for detectors and segmenters: our models, and any of timm's that have feature maps."""

import re
import sys
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.layers import LayerNorm
from vmamba.models.options import check_configured
from vmamba.models.pretrained import Checkpoint, adapted, told_by_timm
from vmamba.models.variants import TIMM, VARIANTS, as_shapes, check_registered, create_model
from vmamba.models.weights import load_weights

STRIDES = (4, 8, 16, 32)


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
    if not isinstance(name, str):
        raise UserError(
            f"the backbone is a {type(name).__name__}; give the name of a model, such as 'vmamba_tiny', or put a "
            f"vmamba.Backbone of this one into MaskRCNN or UperNet"
        )
    if name in VARIANTS:
        return Backbone(create_model(name, pretrained, **options))
    return TimmBackbone(name.removeprefix(TIMM), pretrained, **options)


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
        check_registered(config)
        backbone = create_backbone(settings.NAME, in_chans=settings.IN_CHANS, **drop_path)
    whole = backbone.model if isinstance(backbone, Backbone) else backbone.model.model
    try:
        whole.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    except (AssertionError, AttributeError) as error:
        raise UserError(
            f"TRAIN.USE_CHECKPOINT is true, and timm's {settings.NAME} has no such thing: {error}"
        ) from error
    return backbone


def _not_built(name: str, error: Exception) -> UserError:
    """The sentence for what timm says where it cannot make a backbone of its model `name`."""
    option = re.search(r"unexpected keyword argument\W+(?:s\W+)?(\w+)", str(error))
    if option:
        remedy = "set MODEL.DROP_PATH_RATE null" if option[1] == "drop_path_rate" else "leave it out"
        return UserError(f"timm's '{name}' has no option {option[1]}; {remedy}")
    return UserError(f"timm cannot build '{name}' as a backbone: {error or type(error).__name__}")


class TimmBackbone(nn.Module):
    """Feature maps of a model of timm.

    Images get as many zeros at the right and bottom as the model needs, which is told from its shapes when it is made:
    sides of multiples of 4 are enough for most (Swin, ConvNeXt, ResNet, ...), a few need 32 (HRNet), and some a least
    side of up to 32 (ConvNeXt).  More would change what the others give.

    A model whose stages end without a norm (its stream is normed by the next block alone: Swin, ConvNeXt, ...) gets a
    LayerNorm behind each, as in the detectors of their papers; a model with batch norms needs none.
    """

    def __init__(self, name: str, pretrained: bool = False, **options: Any):
        super().__init__()
        if not timm.is_model(name):
            raise unknown("model", name, [*VARIANTS, *timm.list_models()])
        # Swin's of timm are of one size of image unless told otherwise; the other models do not know the option.
        self.name, self.options = name, ({"strict_img_size": False} if name.startswith("swin") else {}) | options
        # A "getter" holds the model itself, under the names of its weights.
        create = partial(timm.create_model, name, features_only=True, feature_cls="getter", **self.options)
        try:
            every = create().feature_info.reduction()
            lacking = set(STRIDES) - set(every)
            if lacking:
                raise UserError(
                    f"timm's '{name}' gives no feature maps of strides {', '.join(map(str, STRIDES))}: its are of "
                    f"{', '.join(map(str, every))}"
                )
            stages = [len(every) - 1 - every[::-1].index(stride) for stride in STRIDES]
            self.model = create(pretrained=pretrained, out_indices=stages)
        except UserError:
            raise
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise _not_built(name, error) from error
        self.channels: list[int] = self.model.feature_info.channels()
        batch_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())
        for stage, dim in enumerate(self.channels):
            self.add_module(f"outnorm{stage}", nn.Identity() if batch_norms else LayerNorm(dim, keep_float32=True))

        self.multiple, self.least = self._needed_padding()

    def _needed_padding(self) -> tuple[int, int]:
        """What sides must be a multiple of, and the least side; as little as the model runs with."""
        shapes, errors = as_shapes(self.model), []

        def runs(height: int, width: int) -> bool:
            try:
                shapes(torch.empty(1, self.options.get("in_chans", 3), height, width, device="meta"))
            except NotImplementedError:  # of shapes alone this model cannot be run
                return True
            except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
                errors.append(error)
                return False
            return True

        # Such a side is an odd number of each stride that it is no multiple of.
        multiple = next((stride for stride in STRIDES if runs(32 + stride, 64 + stride)), None)
        if multiple is None:
            raise UserError(
                f"timm's '{self.name}' takes images of a size of its own alone, and a detector or segmenter sees ones "
                f"of any size ({errors[-1]}); choose another backbone"
            ) from errors[-1]
        least = next((side for side in STRIDES if side >= multiple and runs(side, side)), STRIDES[-1])
        return multiple, least

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take over the weights of the whole model, in timm's names or its authors', without its classifier.

        Raises UserError, loading nothing, when they are of another model.
        """
        whole = timm.create_model(self.name, **self.options)
        own, heads = whole.state_dict(), tuple(f"{name}." for name in told_by_timm(whole, "classifier"))
        filtered = getattr(sys.modules[timm.model_entrypoint(self.name).__module__], "checkpoint_filter_fn", None)
        try:
            weights = filtered(dict(checkpoint.whole), whole) if filtered else checkpoint.whole
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"'{checkpoint.path}' is no file of weights of timm's '{self.name}': {type(error).__name__} {error}"
            ) from error
        weights = {name: weight for name, weight in weights.items() if not name.startswith(heads)}
        weights = adapted(weights, own, told_by_timm(whole, "first_conv"))
        head = {name: weight for name, weight in own.items() if name.startswith(heads)}
        load_weights(whole, weights | head, checkpoint.path)
        loaded = whole.state_dict()
        self.model.model.load_state_dict({name: loaded[name] for name in self.model.model.state_dict()})

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, channels, H', W').

        The maps are cut to what lies in the images, or partly.
        """
        in_chans = self.options.get("in_chans", 3)
        if images.shape[1] != in_chans:
            shape = tuple(images.shape)
            raise UserError(f"images have shape {shape}; this model takes (batch, {in_chans}, height, width)")
        height, width = images.shape[2:]
        below, right = (max(self.least, -(-side // self.multiple) * self.multiple) - side for side in (height, width))
        maps = []
        for stage, each in enumerate(self.model(F.pad(images, (0, right, 0, below)))):
            each = each[..., : -(-height // STRIDES[stage]), : -(-width // STRIDES[stage])]
            maps.append(self.get_submodule(f"outnorm{stage}")(each.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return maps
