"""The models that are analysed: ours or timm's, by name, with weights from a file or random ones."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.models import load_checkpoint
from torch import nn
from yacs.config import CfgNode

from vmamba.errors import UserError, unknown
from vmamba.models.variants import build_model, create_model, list_models
from vmamba.models.vssm import VSSM
from vmamba.runtime.checkpoint import load_weights, read_checkpoint, read_weights

UNTRAINED = "random weights, not trained on ImageNet"


def create(
    name: str, size: int, weights: str | Path | None = None, backend: str = "auto", **options: int
) -> tuple[nn.Module, str]:
    """A model for images of `size` pixels a side, in eval mode, and what its weights are, to be written on figures.

    Args:
        name: of `vmamba.list_models()` or of `timm.list_models()`.
        weights: a checkpoint; one of our runs says itself what the model's options, classes and channels are.
        backend: of the scans of our models.
        options: num_classes, in_chans where no weights are given.

    Raises UserError for an unknown name, or for weights that do not belong to the model.
    """
    if name in list_models():
        model, label = _ours(name, size, weights, backend, options)
    elif timm.is_model(name):
        model, label = _timm(name, size, weights, options)
    else:
        raise unknown("model", name, [*list_models(), *timm.list_models()])
    return model.eval(), label


def pair_weights(models: Sequence[str], weights: Sequence[str]) -> list[str | None]:
    """One checkpoint a model, in order; "-" stands for none.  Raises UserError when the numbers differ."""
    if weights and len(weights) != len(models):
        raise UserError(
            f"--weights names {len(weights)} files for {len(models)} models; name one a model, '-' for none"
        )
    return [None if path == "-" else path for path in weights] or [None] * len(models)


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one.  Raises UserError for a device that PyTorch does not know or reach."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not to be had ({str(error).splitlines()[0]}); use cpu") from error
    return device


def _ours(name: str, size: int, weights: str | Path | None, backend: str, options: dict) -> tuple[VSSM, str]:
    if weights is None:
        return create_model(name, img_size=size, backend=backend, **options), UNTRAINED
    content = read_checkpoint(weights)
    config = content.get("config") if isinstance(content, dict) else None
    state = read_weights(weights)
    if isinstance(config, dict) and isinstance(config.get("DATA"), dict):
        config = CfgNode(config)
        if name != config.MODEL.NAME:
            raise UserError(f"'{weights}' holds a {config.MODEL.NAME}, not a {name}; name that model")
        model = build_model(config)
        model.set_backend(backend)
        data = config.DATA.DATASET
        label = "trained on ImageNet" if data == "imagenet" else f"trained on {data}, not on ImageNet"
    else:
        if "classifier.head.weight" in state:
            options = options | {"num_classes": len(state["classifier.head.weight"])}
        model = create_model(name, img_size=size, backend=backend, **options)
        label = f"weights {Path(weights).name}"
    load_weights(model, state, weights)
    return model, label


def _timm(name: str, size: int, weights: str | Path | None, options: dict) -> tuple[nn.Module, str]:
    if timm.get_pretrained_cfg(name).fixed_input_size:  # position embeddings and windows of that size
        options = options | {"img_size": size}
    if weights == "pretrained":
        return timm.create_model(
            name, pretrained=True, **options
        ), f"timm's weights {timm.get_pretrained_cfg(name).tag}"
    model = timm.create_model(name, **options)
    if weights is None:
        return model, UNTRAINED
    try:
        load_checkpoint(model, str(weights))
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot load '{weights}' into {name}: {str(error).splitlines()[0]}") from error
    return model, f"weights {Path(weights).name}"
