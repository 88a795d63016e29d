"""The models that are analysed: ours or timm's, by name, with weights from a file or random ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from timm.models import load_checkpoint as load_timm
from torch import nn
from yacs.config import CfgNode

from vmamba.errors import UserError, unknown
from vmamba.models.pretrained import Checkpoint, load_checkpoint, load_pretrained
from vmamba.models.variants import build_model, create_model, list_models

UNTRAINED = "random weights, not trained on ImageNet"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of a channel


@dataclass(frozen=True)
class Subject:
    """A model under analysis, in eval mode."""

    name: str
    model: nn.Module
    weights: str  # what they are, to be written on figures
    in_chans: int = 3
    mean: Sequence[float] = IMAGENET[0]  # of the images it was trained on, values in 0..1
    std: Sequence[float] = IMAGENET[1]


def create(name: str, size: int, weights: str | Path | None = None, backend: str = "auto") -> Subject:
    """A model for square images of `size` pixels a side.

    Args:
        name: of `vmamba.list_models()` or of `timm.list_models()`.
        weights: a checkpoint; one of our runs says itself what the model's options, classes and channels are.  For
            timm's models "pretrained" downloads timm's.
        backend: of the scans of our models.

    Raises UserError for an unknown name, or for weights that do not belong to the model.
    """
    if name in list_models():
        subject = _ours(name, size, weights, backend)
    elif timm.is_model(name):
        subject = _timm(name, size, weights)
    else:
        raise unknown("model", name, [*list_models(), *timm.list_models()])
    subject.model.eval()
    return subject


def create_untrained(name: str, size: int, weights: str | Path | None) -> Subject:
    """The model that `weights` belongs to with random weights, always the same ones.  Raises UserError as `create`."""
    torch.manual_seed(0)
    config = _config(load_checkpoint(weights)) if weights and name in list_models() else None
    if config is None:
        return create(name, size)
    subject = _of_run(name, "auto", config, weights)
    subject.model.eval()
    return replace(subject, weights=UNTRAINED)


def pair_weights(models: Sequence[str], weights: Sequence[str]) -> list[str | None]:
    """One checkpoint a model, in order; "-" stands for none.  Raises UserError when the numbers differ."""
    if weights and len(weights) != len(models):
        raise UserError(f"--weights names {len(weights)} files for {len(models)} models; name one a model, - for none")
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


def _ours(name: str, size: int, weights: str | Path | None, backend: str) -> Subject:
    if weights is None:
        return Subject(name, create_model(name, img_size=size, backend=backend), UNTRAINED)
    checkpoint = load_checkpoint(weights)
    config = _config(checkpoint)
    if config is None:
        head = checkpoint.state_dict.get("classifier.head.weight")
        options = {} if head is None else {"num_classes": len(head)}
        model = create_model(name, img_size=size, backend=backend, **options)
        subject = Subject(name, model, f"weights {checkpoint.path.name}")
    else:
        subject = _of_run(name, backend, config, weights)
    load_pretrained(subject.model, checkpoint)
    return subject


def _config(checkpoint: Checkpoint) -> CfgNode | None:
    """The config in a checkpoint of one of our runs; None in another file."""
    ours = checkpoint.config.get("MODEL", {}).get("NAME") in list_models()
    return CfgNode(checkpoint.config) if ours else None


def _of_run(name: str, backend: str, config: CfgNode, weights: str | Path) -> Subject:
    if name != config.MODEL.NAME:
        raise UserError(f"'{weights}' holds a {config.MODEL.NAME}, not a {name}; name that model")
    model = build_model(config)
    model.set_backend(backend)
    data, channels = config.DATA.DATASET, config.MODEL.IN_CHANS
    label = "trained on ImageNet" if data == "imagenet" else f"trained on {data}, not on ImageNet"
    mean, std = (list(value) * channels if len(value) == 1 else value for value in (config.DATA.MEAN, config.DATA.STD))
    return Subject(name, model, label, channels, mean, std)


def _timm(name: str, size: int, weights: str | Path | None) -> Subject:
    settings = timm.get_pretrained_cfg(name)
    options = {"img_size": size} if settings.fixed_input_size else {}  # position embeddings, windows of that size
    model = timm.create_model(name, pretrained=weights == "pretrained", **options)
    label = {None: UNTRAINED, "pretrained": f"timm's weights {settings.tag}"}.get(weights)
    if label is None:
        label = f"weights {Path(weights).name}"
        try:
            load_timm(model, str(weights))
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot load '{weights}' into {name}: {str(error).splitlines()[0]}") from error
    return Subject(name, model, label, mean=settings.mean, std=settings.std)
