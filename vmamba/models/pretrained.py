"""Files of weights: the released ones, those of mmdetection and mmsegmentation, our own, plain state dicts.

Whatever a file is, `load_checkpoint` gives its weights under our names.  Nothing pickled is run: of what is not tensors
and plain values only the config of the released files is read, as a plain mapping.
"""

import logging
import pickle
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.download import download, is_url
from vmamba.models.released import backbone_weights, keys_from_released
from vmamba.models.vssm import resize_pos_embed
from vmamba.models.weights import load_weights

logger = logging.getLogger("vmamba")
_WHERE = {"ema": ("model_ema", "state_dict_ema"), "model": ("model", "state_dict")}  # in the order of "auto"
_METADATA = {"epoch": "epoch", "max_accuracy": "max_accuracy", "max_accuracy_ema": "max_accuracy_ema"} | {
    "max_accuray_ema": "max_accuracy_ema"  # spelled so in the released files
}


class _Ignored:
    """Stands in for a logged value: takes what is pickled of it and keeps nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What is pickled in such files beside tensors and plain values: the config of the released ones, read as a mapping, and
# what the trainers of detectors and segmenters log, not read at all.
PICKLED = [
    (OrderedDict, "yacs.config.CfgNode"),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Ignored, "numpy.ndarray"),
    (_Ignored, "numpy.dtype"),
    *(
        (_Ignored, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
]


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a file under our names, and what else it tells."""

    path: Path
    source: str  # the key that held them: "model_ema", "model", "state_dict"; "" where the file is a state dict itself
    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]  # those there are of: epoch, max_accuracy and max_accuracy_ema in percent
    config: dict[str, Any]  # of the run that wrote it, as plain values; empty where the file has none

    @property
    def accuracy(self) -> float | None:
        """Top-1 of these weights in percent, where the file tells it."""
        return self.metadata.get("max_accuracy_ema" if self.source == "model_ema" else "max_accuracy")


def load_checkpoint(path_or_url: str | Path, weights: str = "auto") -> Checkpoint:
    """Read the weights of a file, or of an address (downloaded into torch hub's cache).

    Args:
        path_or_url: a file of the original VMamba, of mmdetection or mmsegmentation (its backbone), of a run of ours, a
            state dict, or safetensors.
        weights: "ema" for the averaged weights, "model" for the plain ones, "auto" for the averaged where there are.

    Raises UserError when the file is missing, damaged, or without such weights, or when it holds pickled objects.
    """
    if weights not in ("auto", *_WHERE):
        raise unknown("weights", weights, ("auto", *_WHERE))
    found = read_weights(path_or_url)
    if weights != "auto" and weights not in found:
        raise UserError(f"'{path_or_url}' has no weights '{weights}', only '{next(iter(found))}'; ask for those")
    kind = next(kind for kind in _WHERE if kind in found and weights in ("auto", kind))
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


def read_weights(path_or_url: str | Path) -> dict[str, Checkpoint]:
    """All the weights a file holds, as `load_checkpoint` gives them: "ema" where there are, "model"."""
    path = local_file(path_or_url)
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"'{path_or_url}' holds no weights but a {type(content).__name__}; give a file with a state dict"
        )
    held = {
        kind: (name, content[name])
        for kind, names in _WHERE.items()
        for name in names
        if isinstance(content.get(name), Mapping)
    }
    held = held or {"model": ("", content)}
    metadata = {ours: content[name] for name, ours in _METADATA.items() if isinstance(content.get(name), (int, float))}
    config = _plain(content["config"]) if isinstance(content.get("config"), Mapping) else {}
    return {
        kind: Checkpoint(path, source, _our_weights(state_dict, path_or_url), metadata, config)
        for kind, (source, state_dict) in held.items()
    }


def load_pretrained(model: nn.Module, checkpoint: Checkpoint, drop_head: bool = False) -> None:
    """Load the weights of a file into a model, a position map resized to the model's.

    Args:
        model: a `VSSM`, or a `Backbone`, which takes no classifier.
        drop_head: keep the model's own head instead of the file's; from a file without a classifier, such as a
            detector's, its norm as well, and leave out the norms of the backbone's outputs.

    Raises UserError, listing every difference, when anything else does not fit; nothing is loaded then.
    """
    own, weights = model.state_dict(), dict(checkpoint.state_dict)
    maps = [tensors["pos_embed"] for tensors in (own, weights) if "pos_embed" in tensors]
    if len(maps) == 2 and maps[0].shape != maps[1].shape and maps[0].shape[:2] == maps[1].shape[:2]:
        weights["pos_embed"] = resize_pos_embed(maps[1], maps[0].shape[2:])
        logger.info(f"resized the position map from {tuple(maps[1].shape[2:])} to {tuple(maps[0].shape[2:])}")
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
        raise UserError(f"{error}; for a new head of {classes} classes {place}, use --drop-head") from None


def local_file(path_or_url: str | Path) -> Path:
    """The file itself, downloaded if it is an address.  Raises UserError when it cannot be had."""
    return download(str(path_or_url)) if is_url(path_or_url) else Path(path_or_url).expanduser()


def read_file(path: str | Path) -> Any:
    """What the file holds, tensors on the CPU; nothing pickled but tensors and plain Python values is unpacked.

    A pickled yacs config, which the released files hold, becomes a mapping of plain values.
    Raises UserError, naming the file, when it is missing, truncated or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'; check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(PICKLED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported" not in str(error).lower():  # a global, an opcode
            raise UserError(f"'{path}' is not a checkpoint of PyTorch, or a damaged one") from error
        raise UserError(
            f"'{path}' holds pickled objects besides tensors and plain values, and loading those would run their code; "
            f"save its weights alone (a state dict) and load that"
        ) from error
    except PermissionError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except Exception as error:  # bytes that are not a checkpoint fail in as many ways as there are bytes
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"'{path}' is truncated or not a checkpoint ({reason})") from error


def _our_weights(state_dict: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """A state dict of any origin under our names; of a detector's or segmenter's, the backbone's."""
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UserError(f"'{source}' holds no weights: neither a state dict nor one under 'model' or 'state_dict'")
    if all(name.startswith("module.") for name in state_dict):  # saved from a wrapper for several processes
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    backbone = {name.removeprefix("backbone."): state_dict[name] for name in state_dict if name.startswith("backbone.")}
    if backbone:
        rest = Counter(name.partition(".")[0] for name in state_dict if not name.startswith("backbone."))
        ignored = ", ".join(f"{name} ({count} keys)" for name, count in rest.items())
        logger.info(f"{source}: taking the backbone" + (f", ignoring {ignored}" if rest else ""))
    return keys_from_released(backbone or state_dict)


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
