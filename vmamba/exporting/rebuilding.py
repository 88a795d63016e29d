"""Whether a file of weights gives the model back: a model is built of what the file tells, and both are asked."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.config import restored
from vmamba.detection.mask_rcnn import MaskRCNN
from vmamba.errors import UserError
from vmamba.exporting import programs
from vmamba.exporting.descriptions import beyond, size_of, timm_name
from vmamba.models.backbones import TimmBackbone
from vmamba.models.pretrained import channels_of
from vmamba.models.variants import timm_settings
from vmamba.models.vssm import VSSM
from vmamba.models.weights import load_weights
from vmamba.runtime.task import open_task
from vmamba.segmentation.upernet import UperNet

ROUNDING = 1e-4  # of the largest number


def check(model: nn.Module, config: Mapping[str, Any]) -> None:
    """That the model which `config` builds does with the weights of `model` what `model` does.

    Both are asked, on the CPU in float32 and eval mode, what they say of one image of noise, and of it with a
    thousandth of its contrast, which shows what a norm adds to a variance; and once more with weights of noise, with
    which every layer shows in what comes out.  `model` is left as it is.

    Raises UserError where they differ: some options of timm's models, activations and forward methods of somebody's
    own, and hooks, are neither weights nor names of layers.
    """
    with programs.as_by_default(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        anew = open_task(restored(config)).build_model()
        try:
            load_weights(anew, model.state_dict(), "this model")
        except UserError as error:
            raise beyond(f"what its config builds does not take its weights ({error})") from error
        given, rebuilt = (each.cpu().float().eval() for each in (copy.deepcopy(model), anew))
        given.to(memory_format=torch.contiguous_format)  # so that the arithmetic is the same to the bit
        for each in (given, rebuilt):
            programs.set_backend(each, "reference")
        image = torch.randn(1, *_shape(model, config))
        _compare(given, rebuilt, image)
        _compare(given, rebuilt, image / 1000)
        others = dict(rebuilt.named_parameters())
        for name, weight in given.named_parameters():
            noise = torch.randn(weight.shape)
            noise = noise * (len(weight) / weight.numel()) ** 0.5 if weight.dim() > 1 else 1 + noise / 10
            weight.copy_(noise)
            others[name].copy_(noise)
        _compare(given, rebuilt, image)


def _shape(model: nn.Module, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the smallest image that is sure to do; of one that timm's model is built for."""
    whole = model.backbone if isinstance(model, (UperNet, MaskRCNN)) else model
    if timm_name(whole):
        known = size_of(whole) or timm_settings(timm_name(whole)).input_size[1:]
        return channels_of(whole), *map(min, known, config["DATA"]["IMG_SIZE"])
    if isinstance(whole, TimmBackbone):
        return config["MODEL"].get("IN_CHANS", 3), 224, 224
    side = max(programs.open_sides(whole)[0], 32)
    return next(each for each in whole.modules() if isinstance(each, VSSM)).in_chans, side, side


def _asked(model: nn.Module, images: Tensor) -> list[Tensor]:
    if not isinstance(model, MaskRCNN):
        return [model(images)]
    maps = model.pyramid(images)  # which boxes it finds may hang on a last bit
    scores, offsets = model.rpn_head(maps)
    regions = [maps[0][:, :, :1, :1].expand(-1, -1, side, side) for side in (7, 14)]
    return [*scores, *offsets, *model.roi_head.bbox_head(regions[0]), model.roi_head.mask_head(regions[1])]


def _compare(given: nn.Module, rebuilt: nn.Module, images: Tensor) -> None:
    try:
        answers = _asked(given, images)
    except Exception as error:  # of a forward method that may be anybody's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise beyond(f"it says nothing of an image of the shape {tuple(images.shape)} ({reason})") from error
    for one, other in zip(answers, _asked(rebuilt, images), strict=True):
        if not isinstance(one, Tensor) or one.shape != other.shape:
            what = f"numbers of the shape {tuple(one.shape)}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
            raise beyond(f"it gives {what} for an image, and what its config builds {tuple(other.shape)}")
        largest = other[other.isfinite()].abs().max() if other.isfinite().any() else other.new_zeros(())
        if not torch.isclose(one, other, rtol=0, atol=float(ROUNDING * largest), equal_nan=True).all():
            raise beyond(
                "what its config builds gives other numbers for the same image, so it has options, activations, hooks "
                "or a forward method that no config tells"
            )
