"""Files of weights: the released ones, those of mmdetection and mmsegmentation, our own, plain state dicts.

Whatever a file is (`formats`), `load_checkpoint` gives its weights under our names.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.download import download, is_url
from vmamba.models.formats import read_file
from vmamba.models.released import backbone_weights, keys_from_released
from vmamba.models.vssm import VSSM, resize_pos_embed
from vmamba.models.weights import is_beyond, is_image, is_plain, load_weights, unwrapped, without_wrappers
from vmamba.text import counted, printable

logger = logging.getLogger("vmamba")
_WHERE = {"ema": ("model_ema", "state_dict_ema", "ema"), "model": ("model", "state_dict")}  # in the order of "auto"
_INSIDE = ("module", "model", "state_dict", "ema")  # where a mapping under one of those may have the weights
_METADATA = {"epoch": "epoch", "max_accuracy": "max_accuracy", "max_accuracy_ema": "max_accuracy_ema"} | {
    "max_accuray_ema": "max_accuracy_ema"  # spelled so in the released files
}
_LEFTOVERS = ("n_averaged", "total_ops", "total_params")  # buffers that averaging and profilers leave behind
_STEM = re.compile(r"((?:.*\.)?)patch_embed\.(?:0|proj)\.weight")  # which every model of ours has, behind a prefix


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a file under our names, and what else it tells."""

    path: Path
    source: str  # the key that held them: "model_ema", "model", "state_dict"; "" where the file is a state dict itself
    whole: dict[str, Tensor]  # all the weights, under the file's names without those of wrappers
    metadata: dict[str, Any]  # those there are of: epoch, max_accuracy and max_accuracy_ema in percent, best_weights
    config: dict[str, Any]  # of the run that wrote it, as plain values; empty where the file has none
    classes: tuple[str, ...] = ()  # their names, where the file tells them

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Under our names; of a detector's or segmenter's file the backbone.  Raises UserError where it is not clear
        which of several models is meant."""
        return our_weights(self.whole, self.path)

    def __repr__(self) -> str:
        numbers = sum(weight.numel() for weight in self.state_dict.values())
        held = f"{len(self.state_dict)} tensors of {numbers:,} numbers"
        return f"Checkpoint('{self.path}', source={self.source!r}, {held}, metadata={self.metadata})"

    @property
    def accuracy(self) -> float | None:
        """Top-1 of these weights in percent, where the file tells it."""
        return self.metadata.get("max_accuracy_ema" if self.source in _WHERE["ema"] else "max_accuracy")


def load_checkpoint(path_or_url: str | Path, weights: str = "auto") -> Checkpoint:
    """Read the weights of a file, or of an address (downloaded into torch hub's cache).

    Args:
        path_or_url: a file of the original VMamba, of mmdetection or mmsegmentation (its backbone), of timm, of a run
            of ours, a state dict, or safetensors.
        weights: "ema" for the averaged weights, "model" for the plain ones, "auto" for those that the file says are its
            best ("best_weights", in files of our runs), else the averaged where there are.

    Raises UserError when the file is missing, damaged, or without such weights, or when it holds pickled objects.
    """
    found = open_checkpoint(path_or_url, weights)
    _ = found.state_dict  # which may not be clear
    return found


def open_checkpoint(path_or_url: str | Path, weights: str = "auto") -> Checkpoint:
    """As `load_checkpoint`, of files of whatever model."""
    if not isinstance(weights, str) or weights not in ("auto", *_WHERE):
        raise unknown("weights", weights, ("auto", *_WHERE))
    found = read_weights(path_or_url)
    if weights != "auto" and weights not in found:
        raise UserError(f"'{path_or_url}' has no weights '{weights}', only '{next(iter(found))}'; ask for those")
    kind = best_kind(found) if weights == "auto" else weights
    chosen = found[kind]
    others = [f"'{other.source}'" for name, other in found.items() if name != kind]
    facts = [f"epoch {chosen.metadata['epoch']}"] if "epoch" in chosen.metadata else []
    facts += [f"{chosen.accuracy:.2f}% top-1"] if chosen.accuracy is not None and chosen.accuracy >= 0 else []
    logger.info(
        f"{path_or_url}: taking the weights {repr(chosen.source) if chosen.source else '(a plain state dict)'}"
        + (f" ({', '.join(facts)})" if facts else "")
        + (f", not {', '.join(others)}" if others else "")
    )
    return chosen


def best_kind(found: Mapping[str, Checkpoint]) -> str:
    """Which of `read_weights`'s "auto" means: "ema" or "model"."""
    best = next(iter(found.values())).metadata.get("best_weights")
    return best if best in found else next(kind for kind in _WHERE if kind in found)


def read_weights(path_or_url: str | Path) -> dict[str, Checkpoint]:
    """All the weights a file holds, as `load_checkpoint` gives them: "ema" where there are, "model"."""
    path = local_file(path_or_url)
    content = read_file(path)
    held = weights_in(content, path_or_url)
    numbers = {ours: _number(content[name]) for name, ours in _METADATA.items() if name in content}
    metadata: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    if content.get("best_weights") in list(_WHERE):
        metadata["best_weights"] = content["best_weights"]
    config = _plain(content["config"]) if isinstance(content.get("config"), Mapping) else {}
    names = content.get("classes")
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    rest = metadata, config, tuple(names) if named else ()
    return {kind: Checkpoint(path, source, weights, *rest) for kind, (source, weights) in held.items()}


def weights_in(content: Any, source: object) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """What a file's content holds: "ema" where there are averaged weights, "model": (their key, they without wrappers).

    Raises UserError, naming `source`, where there are no weights or it is not clear which.
    """
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"'{source}' holds no weights but a {kind}; give a file with a state dict")
    if _is_state_dict(content):
        return {"model": ("", _unwrapped(content, source))}
    found = {name: weights for name, value in content.items() if (weights := _weights_of(value)) is not None}
    held = {}
    for kind, names in _WHERE.items():
        name = next((name for name in names if name in found), None)
        if name is not None:
            held[kind] = name
    if not held:
        if len(found) > 1:
            raise UserError(f"'{source}' holds weights under {_listed(found)}; save those of one of them alone")
        if any(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"'{source}' holds {_odd(content)} among tensors; save a state dict of tensors alone")
        if not found:
            raise UserError(f"'{source}' holds no weights: neither a state dict nor one under 'model' or 'state_dict'")
        held = {"model": next(iter(found))}
    for name in (name for names in _WHERE.values() for name in names if name not in found and content.get(name)):
        logger.warning(f"{source}: passing over '{name}', which is no state dict")
    more = [name for name, weights in found.items() if name not in held.values() and any(map(_STEM.fullmatch, weights))]
    if more:
        logger.info(f"{source}: passing over the weights under {_listed(more)}")
    return {kind: (name, _unwrapped(found[name], source)) for kind, name in held.items()}


def calls_otherwise(path: Path, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The sentence for a file at `path` that calls its classes otherwise than `ours`, of as many, so that a class's
    number would mean another one; "" where it does not."""
    if len(ours) != len(theirs) or list(ours) == list(theirs):
        return ""
    number = next(number for number, name in enumerate(ours) if name != theirs[number])
    return (
        f"'{printable(path)}' calls class {number} '{printable(theirs[number])}', and here it is "
        f"'{printable(ours[number])}': is it of the same classes in the same order?"
    )


def load_pretrained(model: nn.Module, checkpoint: Checkpoint, drop_head: bool = False) -> None:
    """Load the weights of a file into a model, a position map resized to the model's, and the first convolution of a
    file of RGB images adapted to another number of channels as timm does.

    Args:
        model: a `VSSM`; a `Backbone`, which takes no classifier; or one of timm's models, with its file's own names.
        drop_head: keep the model's own head instead of the file's; from a file without a classifier, such as a
            detector's, its norm as well, and leave out the norms of the backbone's outputs.

    Raises UserError, listing every difference, when anything else does not fit; nothing is loaded then.
    """
    model = unwrapped(model)
    if not isinstance(model, (VSSM, Backbone)):
        return _load_timm(model, checkpoint, drop_head)
    own = without_wrappers(model.state_dict())
    ours = {name.removeprefix("model."): weight for name, weight in own.items()} if isinstance(model, Backbone) else own
    weights = adapted(checkpoint.state_dict, ours)
    if isinstance(model, Backbone):
        weights = backbone_weights(model, weights)
    elif drop_head:
        weights = _without_head(weights, own, checkpoint.path)
    try:
        load_weights(model, weights, checkpoint.path)
    except UserError as error:
        classes, in_file = _classes(own), _classes(weights)
        if classes == in_file or drop_head:
            raise
        place = f"in place of the file's of {in_file}" if in_file else "where the file has no classifier"
        raise UserError(
            f"{error}; for a new head of {counted(classes, 'class', 'classes')} {place}, use --drop-head"
        ) from None


def _load_timm(model: nn.Module, checkpoint: Checkpoint, drop_head: bool) -> None:
    own = model.state_dict()
    weights = adapted(checkpoint.whole, own, told_by_timm(model, "first_conv"))
    heads = tuple(f"{name}." for name in told_by_timm(model, "classifier"))
    if drop_head and not heads:
        raise UserError(
            f"this {type(model).__name__} has no head that is known, so --drop-head would drop nothing; leave it out, "
            f"or let the model tell its classifier as timm's do (pretrained_cfg)"
        )
    if drop_head:
        kept = {name: weight for name, weight in own.items() if name.startswith(heads)}
        weights = {name: weight for name, weight in weights.items() if not name.startswith(heads)} | kept
        logger.info(
            f"{checkpoint.path}: dropped the head ({heads[0][:-1]}); the model's of {model.num_classes} classes "
            "starts at random"
        )
    try:
        load_weights(model, weights, checkpoint.path)
    except UserError as error:
        if any(
            weights.get(name) is not None and weights[name].shape != own[name].shape
            for name in own
            if name.startswith(heads)
        ):
            raise UserError(
                f"{error}; for a new head of {counted(model.num_classes, 'class', 'classes')}, use --drop-head"
            ) from None
        raise


def local_file(path_or_url: str | Path) -> Path:
    """The file itself, downloaded if it is an address.  Raises UserError when it cannot be had."""
    if not isinstance(path_or_url, (str, os.PathLike)):
        raise UserError(f"{path_or_url!r:.60} is no file; give the path of a file of weights, or its address")
    return download(str(path_or_url)) if is_url(path_or_url) else Path(path_or_url).expanduser()


def adapted(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], first_convs: Sequence[str] = ("patch_embed.0",)
) -> dict[str, Tensor]:
    """`weights` with a position map and first convolutions of the sizes that a model's `own` weights have, as far as
    that can be, which is logged."""
    weights = dict(weights)
    theirs, ours = weights.get("pos_embed"), own.get("pos_embed")
    if _differ(theirs, ours) and theirs.shape[:2] == ours.shape[:2]:
        weights["pos_embed"] = resize_pos_embed(theirs, ours.shape[2:])
        logger.info(f"resized the position map from {tuple(theirs.shape[2:])} to {tuple(ours.shape[2:])}")
    for name in (f"{layer}.weight" for layer in first_convs):
        theirs, ours = weights.get(name), own.get(name)
        if _differ(theirs, ours) and theirs.shape[1] == 3 != ours.shape[1]:
            weights[name] = adapt_input_conv(ours.shape[1], theirs)
            logger.info(f"adapted the first convolution from 3 channels of the images to {ours.shape[1]}")
    return weights


def told_by_timm(model: nn.Module, what: str) -> tuple[str, ...]:
    """The names of a timm model's "classifier" or "first_conv"; a distilled model has two classifiers."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get(what) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def channels_of(model: nn.Module) -> int:
    """Of the images of a classifier, ours or timm's: what it says itself, else of its first convolution."""
    if isinstance(getattr(model, "in_chans", None), int):  # of some, pixels become channels before they are convolved
        return model.in_chans
    first = told_by_timm(model, "first_conv")
    return model.get_submodule(first[0]).weight.shape[1] if first else 3


def _differ(theirs: Tensor | None, ours: Tensor | None) -> bool:
    """Whether both are there, of four dimensions and numbers that ours can hold, but of other sizes."""
    if theirs is None or ours is None or not is_image(theirs) or ours.dim() != 4:
        return False
    return theirs.shape != ours.shape and not is_beyond(theirs, ours.dtype)


def _is_state_dict(value: Any) -> bool:
    named = isinstance(value, Mapping) and bool(value) and all(isinstance(name, str) for name in value)
    return named and all(isinstance(each, Tensor) for each in value.values())


def _weights_of(value: Any) -> Mapping[str, Tensor] | None:
    """The state dict that `value` is or, as averaging and wrappers save themselves, has inside as its only one."""
    if _is_state_dict(value):
        return value
    inside = [value[name] for name in _INSIDE if _is_state_dict(value.get(name))] if isinstance(value, Mapping) else []
    return inside[0] if len(inside) == 1 else None


def _odd(content: Mapping[Any, Any]) -> str:
    """What keeps a mapping with tensors from being a state dict."""
    name = next(name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor)))
    if not isinstance(name, str):
        return f"the name {name!r}, a {type(name).__name__},"
    return f"'{name}', a {type(content[name]).__name__},"


def _number(value: Any) -> int | float | None:
    """A number of a file's, which may be in a tensor; None where it is none."""
    if isinstance(value, Tensor) and value.numel() == 1 and is_plain(value):
        value = value.item()
    return value if isinstance(value, (int, float)) else None


def _unwrapped(state_dict: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Without what wrappers put in front of the names and into them, and what averaging leaves."""
    weights = without_wrappers(state_dict)
    leftovers = [name for name in weights if name.rpartition(".")[2] in _LEFTOVERS]
    if leftovers:
        logger.info(f"{source}: ignoring {len(leftovers)} buffers of averaging or profiling ({leftovers[0]}, ...)")
        weights = {name: weight for name, weight in weights.items() if name not in leftovers}
    return weights


def our_weights(weights: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """A state dict of any origin under our names: of a detector's or segmenter's the backbone is left."""
    prefix = _prefix(weights, source)
    if prefix:
        beside = prefix.removesuffix(f"{prefix.split('.')[-2]}.")  # where our own Backbone has its norms
        kept = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        norms = {name for name in weights if name.startswith(f"{beside}outnorm")}
        kept |= {name.removeprefix(beside): weights[name] for name in norms}
        rest = Counter(name.partition(".")[0] for name in weights if not name.startswith(prefix) and name not in norms)
        ignored = ", ".join(f"{name} ({count} keys)" for name, count in rest.items())
        logger.info(f"{source}: taking what is under '{prefix[:-1]}'" + (f", ignoring {ignored}" if rest else ""))
        weights = kept
    return keys_from_released(weights)


def _prefix(weights: Mapping[str, Tensor], source: object) -> str:
    """What stands in front of the names of our models, "" or "backbone." or "module.model."."""
    found = sorted({match[1] for match in map(_STEM.fullmatch, weights) if match})
    if not found or "" in found:
        return ""
    if len(found) > 1 and "backbone." not in found:
        places = _listed([prefix[:-1] for prefix in found])
        raise UserError(f"'{source}' holds several models, under {places}; save one of them alone")
    return "backbone." if "backbone." in found else found[0]


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))


def _without_head(weights: dict[str, Tensor], own: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """`weights` with the model's `own` head; see `load_pretrained`."""
    if any(name.startswith("classifier.") for name in weights):
        dropped, what = ("classifier.head.",), f"dropped the head of {_classes(weights)} classes"
    else:
        dropped, what = ("classifier.", "outnorm"), "there is no classifier; ignored the norms of the outputs"
    logger.info(f"{source}: {what}; the model's head of {_classes(own)} classes starts at random")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(dropped)}
    return kept | {name: weight for name, weight in own.items() if name.startswith(dropped)}


def _classes(weights: Mapping[str, Tensor]) -> int:
    return len(weights["classifier.head.weight"]) if "classifier.head.weight" in weights else 0


def _plain(node: Any) -> Any:
    """Mappings as dicts, all the way down."""
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, Mapping) else node
