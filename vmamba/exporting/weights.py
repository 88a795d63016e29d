"""Bare weights: a file of names and tensors, and what tells the model they are of.

`vmamba.load_checkpoint`, `predict.py` and timm read it.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.files import write_atomically
from vmamba.models.backbone import Backbone
from vmamba.models.options import CONFIGURABLE
from vmamba.models.released import to_released
from vmamba.models.variants import VARIANTS
from vmamba.models.vssm import VSSM
from vmamba.models.weights import is_plain, without_wrappers

ABOUT = "vmamba"  # in the metadata of safetensors and ONNX


def about(
    model: nn.Module, size: Sequence[int], classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """What a file tells of its model: `config`, of a classifier, as in checkpoints of runs (name and options of the
    model; size, mean and deviation of the images), and `classes`, their names.

    Without the model where its options no longer describe it.  Raises UserError for names that are not one for each
    class, and numbers that are not one for each channel.
    """
    classes = [str(name) for name in classes]
    count = getattr(model, "num_classes", None)
    if classes and len(classes) != count:
        raise UserError(f"classes names {len(classes)}, and the model has {count}; give one name for each")
    told: dict[str, Any] = {"classes": classes} if classes else {}
    if not isinstance(model, VSSM) or not model.num_classes:
        return told
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, model.in_chans):
            raise UserError(f"{name} has {len(values)} numbers; give one, or one for each of {model.in_chans} channels")
    data = {"IMG_SIZE": [int(side) for side in size], "MEAN": [float(x) for x in mean], "STD": [float(x) for x in std]}
    if model.pos_embed is not None:
        data["IMG_SIZE"] = [side * model.patch_size for side in model.pos_embed.shape[2:]]
    config: dict[str, Any] = {"TASK": "classification", "DATA": data}
    if (found := described(model)) is not None:
        held = {"NAME": found[0], "NUM_CLASSES": model.num_classes, "IN_CHANS": model.in_chans, "OPTIONS": found[1]}
        config["MODEL"] = held
    return told | {"config": config}


def described(model: VSSM) -> tuple[str, dict[str, Any]] | None:
    """The variant that has most of the model's options, and those that it has otherwise.

    None where a model of these options has other weights than `model`, which was changed since.
    """
    given = {name: _plain(getattr(model.options, name)) for name in CONFIGURABLE}
    defaults = {name: parameter.default for name, parameter in inspect.signature(VSSM).parameters.items()}
    differing = {}
    for name, variant in VARIANTS.items():
        own = defaults | variant.options
        own = {option: _plain(own[option]) for option in given}
        differing[name] = {option: value for option, value in given.items() if value != own[option]}
    name = min(differing, key=lambda each: len(differing[each]))
    with torch.device("meta"):
        anew = VSSM(**given, num_classes=model.num_classes, in_chans=model.in_chans, img_size=model.options.img_size)
    return (name, differing[name]) if _shapes(anew) == _shapes(model) else None


def spelt(model: nn.Module, spelling: str) -> dict[str, Tensor]:
    """The weights as they are on the CPU, under the names of a spelling.

    Raises UserError for weights without numbers, for a model that its options no longer describe, and as `to_released`
    does.
    """
    if isinstance(model, VSSM) and model.num_classes and described(model) is None:
        raise UserError(
            "the model's layers are no longer those that its options make, so no file could tell what it is; save its "
            "weights alone with torch.save(model.state_dict(), path)"
        )
    if spelling == "ours":
        held = without_wrappers(model.state_dict())
    elif isinstance(model, (VSSM, Backbone)):
        held = to_released(model, january=spelling == "january")
    else:
        raise UserError(
            f"spelling is '{spelling}', which classifiers and backbones have alone; of a {type(model).__name__} export "
            f"the backbone so, or leave the spelling out"
        )
    for name, weight in held.items():
        if not is_plain(weight):
            raise UserError(f"'{name}' holds no plain numbers; export a model whose weights do")
    return {name: weight.detach().cpu().clone(memory_format=torch.contiguous_format) for name, weight in held.items()}


def write(path: Path, format: str, held: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A file of torch.save holds the weights under "model" beside `about`; one of safetensors `about` as JSON in its
    metadata."""
    if format == "pth":
        write_atomically(path, lambda file: torch.save({"model": dict(held), **about}, file))
    else:
        content = save(dict(held), {"format": "pt", ABOUT: json.dumps(about)})
        write_atomically(path, lambda file: file.write(content))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
