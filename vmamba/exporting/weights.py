"""Bare weights: a file of names and tensors, and what tells the model they are of.

`vmamba.load_checkpoint`, `predict.py` and timm read it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.exporting.descriptions import described, size_of, timm_name
from vmamba.files import write_atomically
from vmamba.models.backbone import Backbone
from vmamba.models.backbones import TimmBackbone
from vmamba.models.pretrained import channels_of
from vmamba.models.released import to_released
from vmamba.models.vssm import VSSM
from vmamba.models.weights import is_plain, without_wrappers
from vmamba.text import counted

ABOUT = "vmamba"  # in the metadata of safetensors and programs


def about(
    model: nn.Module,
    size: Sequence[int],
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    needed: bool,
) -> dict[str, Any]:
    """What a file tells of its model: `config`, but of a backbone, as in checkpoints of runs (name and options of the
    model; size, mean and deviation of the images), and `classes`, their names.

    Args:
        needed: whether a file that does not tell what to build is of no use.

    Raises UserError for names that are not one for each class, numbers that are not one for each channel, and where
    what is needed cannot be told.
    """
    count = getattr(model, "num_classes", None)
    if classes and len(classes) != count:
        raise UserError(f"classes names {len(classes)}, and the model has {count}; give one name for each")
    told: dict[str, Any] = {"classes": list(classes)} if classes else {}
    if isinstance(model, (Backbone, TimmBackbone)):
        return told
    whole = isinstance(model, VSSM) or bool(timm_name(model))
    channels = channels_of(model) if whole else 3
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(
                f"{name} has {len(values)} numbers; give one, or one for each of {counted(channels, 'channel')}"
            )
    try:
        config = described(model, size) or {}
    except UserError:
        if needed:
            raise
        config = {"TASK": "classification"} if whole else {}
    data = {"MEAN": list(mean), "STD": list(std)}
    if whole:
        data["IMG_SIZE"] = list(size_of(model) or size)
    if config:
        config["DATA"] = config.get("DATA", {}) | data
    return told | ({"config": config} if config else {})


def spelt(model: nn.Module, spelling: str) -> dict[str, Tensor]:
    """The weights as they are on the CPU, under the names of a spelling.

    Raises UserError for weights without numbers, and as `to_released` does.
    """
    if spelling == "ours":
        held = without_wrappers(model.state_dict())
    elif isinstance(model, (VSSM, Backbone)):
        held = to_released(model, january=spelling == "january")
    else:
        remedy = "export the backbone so, or leave the spelling out" if hasattr(model, "backbone") else "leave it out"
        raise UserError(
            f"spelling is '{spelling}', which classifiers and backbones of ours have alone; of a "
            f"{type(model).__name__} {remedy}"
        )
    for name, weight in held.items():
        if not is_plain(weight):
            raise UserError(f"'{name}' holds no plain numbers; export a model whose weights do")
    return {name: weight.detach().cpu().clone(memory_format=torch.contiguous_format) for name, weight in held.items()}


def write(path: Path, format: str, held: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A file of torch.save holds the weights under "model" beside `about`, and `ABOUT` says who wrote it; one of
    safetensors has `about` as JSON in its metadata."""
    if format == "pth":
        write_atomically(path, lambda file: torch.save({"model": dict(held), **about, ABOUT: "export"}, file))
    else:
        content = save(dict(held), {"format": "pt", ABOUT: json.dumps(about)})
        write_atomically(path, lambda file: file.write(content))
