"""Whole models that stand on a backbone, a detector or a segmenter: released files, and which model a file is of."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.layers import go_together
from vmamba.models.pretrained import Checkpoint, load_pretrained
from vmamba.models.released import backbone_weights, from_released, keys_from_released
from vmamba.models.variants import VARIANTS, create_model
from vmamba.models.weights import load_weights
from vmamba.text import some

logger = logging.getLogger("vmamba")
_BACKBONE = "backbone."


def build_whole(
    kind: type[nn.Module], backbone: Callable[[], nn.Module], num_classes: int, options: Mapping[str, Any]
) -> nn.Module:
    """`kind(backbone(), num_classes, **options)`.

    `kind.takes` says what its options take, but those that have a type of their own.
    Raises UserError, before the backbone is made, for an option that it does not have and for a value that cannot be.
    """
    parameters = inspect.signature(kind).parameters
    given = {"num_classes": num_classes}
    for name, value in options.items():
        if name not in list(parameters)[2:]:
            raise unknown(f"option of {kind.__name__}", name, list(parameters)[2:])
        given[name] = value
    for name, value in given.items():
        if name in kind.takes:
            given[name] = kind.takes[name].check(name, value)
        elif not isinstance(value, type(parameters[name].default)):
            expected = type(parameters[name].default).__name__
            raise UserError(f"{name} is {value!r:.60} ({type(value).__name__}); expected {expected}")
    return kind(backbone(), **given)


def check_images(images: Tensor, weight: Tensor, kind: str) -> None:
    """Raises UserError for what is no batch of one image or more, of numbers like those of a `kind`'s `weight`, and
    under torch.fx."""
    if isinstance(images, torch.fx.Proxy):
        raise UserError(f"torch.fx cannot follow a whole {kind}, whose way depends on its inputs; trace its backbone")
    if not isinstance(images, Tensor):
        raise UserError(f"images are a {type(images).__name__}; a {kind} takes a tensor (batch, channels, H, W)")
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise UserError(f"images have shape {shape}; a {kind} takes (batch, channels, H, W)")
    if 0 in shape:
        raise UserError(f"images have shape {shape}; a {kind} takes one image or more, of a pixel or more")
    if not go_together(images, weight):
        raise UserError(
            f"images are of {images.dtype}, and the weights of {weight.dtype}; normalise them, in that type"
        )


def check_config(config: Mapping[str, Any], place: str, needed: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError where a released `config`, or the part of it that `place` names, lacks one of `needed` or has
    what is neither of these nor `known`; a note may be in any."""
    if not isinstance(config, Mapping):
        raise UserError(f"{place} is {config!r:.60}; expected a mapping")
    for name in config:
        if name not in (*needed, *known, "note"):
            raise unknown(f"option in {place}", name, [*needed, *known])
    for name in needed:
        if name not in config:
            raise UserError(f"{place} lacks {name}; it has {some(list(config))}")


def shape_of(
    weights: Mapping[str, Tensor], name: str, dims: int, source: object, rows: tuple[int, int] = (1, 10**6)
) -> tuple[int, ...]:
    """The shape of the weight of a file that tells how large the model is.

    Raises UserError, naming `source` and the weight, where it is missing or empty, has other than `dims` dimensions, or
    fewer or more than `rows` rows.
    """
    if name not in weights:
        raise UserError(f"'{source}' is no whole model: it has no {name}; give a file with all of its weights")
    shape = tuple(weights[name].shape)
    if len(shape) != dims or 0 in shape or not rows[0] <= shape[0] <= rows[1]:
        raise UserError(
            f"'{source}' holds {name} of shape {shape}; expected {dims} dimensions, the first from {rows[0]} to "
            f"{rows[1]}; the file is of another model"
        )
    return shape


def released_backbone(options: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Backbone:
    """The backbone of a released file's `options` and weights."""
    weights = {
        name.removeprefix(_BACKBONE): weight for name, weight in state_dict.items() if name.startswith(_BACKBONE)
    }
    return from_released(options, weights, features=(0, 1, 2, 3))


def load_whole(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: object,
) -> None:
    """Load the weights of backbone and heads, under our names or the released ones, in either of their spellings.

    A model whose names of heads are not the released ones has `name_of_head`.  Raises UserError, naming `source` and
    listing every difference.
    """
    if not any(name.startswith(_BACKBONE) for name in state_dict):
        raise UserError(
            f"'{source}' holds no weights under '{_BACKBONE[:-1]}', so they are of a classifier or a backbone alone; "
            f"it can start a training (--pretrained), and is nothing to evaluate"
        )
    load_weights(model, _our_names(model, state_dict), source)


def start_whole(model: nn.Module, checkpoint: Checkpoint, drop_head: bool) -> None:
    """Start from a file of the whole model, with `drop_head` without the layers whose size is that of the classes
    (`class_layers` of the model), or from one of the backbone, such as a classifier's.

    Raises UserError, listing every difference, when anything else does not fit; nothing is loaded then.
    """
    heads = {name.partition(".")[0] for name in model.state_dict()} - {_BACKBONE[:-1]}
    if not any(name.partition(".")[0] in heads for name in checkpoint.whole):
        if isinstance(model.backbone, Backbone):
            load_pretrained(model.backbone, checkpoint)
        else:
            model.backbone.start_from(checkpoint)
        return
    weights = _our_names(model, checkpoint.whole)
    own = {name: weight for name, weight in model.state_dict().items() if name.startswith(model.class_layers)}
    others = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if drop_head:
        weights = {name: weight for name, weight in weights.items() if not name.startswith(model.class_layers)} | own
        logger.info(f"{checkpoint.path}: dropped the layers of its classes, which start at random")
    try:
        load_weights(model, weights, checkpoint.path)
    except UserError as error:
        if drop_head or not others:
            raise
        raise UserError(f"{error}; for new layers in place of the file's {some(others)}, use --drop-head") from None


def _our_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a whole model's weights; see `load_whole`."""
    rename = getattr(model, "name_of_head", str)
    own, theirs = {}, {}
    for name, weight in state_dict.items():
        if name.startswith(_BACKBONE):
            theirs[name.removeprefix(_BACKBONE)] = weight
        else:
            own[rename(name)] = weight
    if isinstance(model.backbone, Backbone):
        theirs = {name.removeprefix("model."): weight for name, weight in theirs.items()}
        theirs = backbone_weights(model.backbone, keys_from_released(theirs))
    return own | {f"{_BACKBONE}{name}": weight for name, weight in theirs.items()}


def variant_of(state_dict: Mapping[str, Tensor], source: str | Path) -> str:
    """Which of our models, by name, the backbone or classifier in a released file is, told from its weights' names and
    shapes.

    Raises UserError, naming `source`, when it is none of them.
    """
    weights = keys_from_released(
        {name.removeprefix(_BACKBONE).removeprefix("model."): weight for name, weight in state_dict.items()}
    )
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if name.startswith(("layers", "patch"))}
    for name in VARIANTS:
        if _shapes(name) == shapes:
            return name
    raise UserError(f"the backbone in '{source}' is none of the models by name; say what it is in a config")


@cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = create_model(name)
    return {
        name: tuple(weight.shape) for name, weight in model.state_dict().items() if name.startswith(("layers", "patch"))
    }
