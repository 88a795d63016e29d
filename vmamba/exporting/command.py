"""What `python export.py` does: a model by name, or that of a checkpoint of any task, as a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from yacs.config import CfgNode

from vmamba.analysis.classes import class_names
from vmamba.analysis.prediction import config_of, read_names
from vmamba.config import image_size
from vmamba.errors import UserError
from vmamba.exporting import export
from vmamba.files import check_keeps
from vmamba.models.pretrained import open_checkpoint
from vmamba.models.variants import create_model
from vmamba.models.vssm import VSSM
from vmamba.runtime.task import open_task

PARTS = ("whole", "backbone")
_SIZE = 224


@dataclass(frozen=True)
class _Source:
    """A model with what is known of its images and classes."""

    model: nn.Module
    size: Any = _SIZE
    facts: dict[str, Sequence[Any]] = field(default_factory=dict)  # classes, mean, std


def export_file(
    *,
    model: str | None = None,
    checkpoint: str | None = None,
    cfg: str | None = None,
    names: str | None = None,
    weights: str = "auto",
    part: str = "whole",
    format: str | None = None,
    size: int | None = None,
    dynamic: Sequence[str] = ("batch",),
    spelling: str = "ours",
    output: str = "",
) -> Path:
    """Write a model to the file `output`, see `vmamba.export`.

    Args:
        model: a name of `vmamba.list_models()`: random weights.
        checkpoint: in its place, of a run of any task or a released file, or its address.
        cfg: the config of a checkpoint that does not hold its own.
        names: a file with the name of a class in each line, where the checkpoint's data does not tell them.
        weights: as of `vmamba.load_checkpoint`.
        part: "backbone" of a detector or segmenter alone.
        size: of the images, a side in pixels; None is that of the run, or 224.
        format, dynamic, spelling: as of `vmamba.export`.

    Returns the path.  Raises UserError as `vmamba.export` does, for a checkpoint that cannot be read, and where it
    would be written over.
    """
    if not output:
        raise UserError("--output is missing; name the file to be written, such as model.onnx")
    if (model is None) == (checkpoint is None):
        raise UserError("give one of --model, for random weights, and --checkpoint")
    if model is not None:
        source = _Source(create_model(model))
    else:
        check_keeps(filter(None, [checkpoint, cfg, names]), output)
        source = _of_checkpoint(checkpoint, cfg, names, weights)
    whole = source.model
    if part == "backbone":
        if not hasattr(whole, "backbone"):
            raise UserError(
                "--part backbone is of detectors and segmenters, and this is a classifier; in Python a "
                "vmamba.Backbone of it is exported likewise"
            )
        whole, facts = whole.backbone, {}
    else:
        facts = source.facts
    options = dict(format=format, size=source.size if size is None else size, dynamic=dynamic, spelling=spelling)
    path = export(whole, output, **options, **facts)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return path


def _of_checkpoint(checkpoint: str, cfg: str | None, names: str | None, weights: str) -> _Source:
    found = open_checkpoint(checkpoint, weights)
    config = config_of(found, cfg)
    task = open_task(config)
    model = task.build_model()
    task.load(model, found)
    classes = read_names(names, config) if names else list(found.classes) or _told(config)
    facts = dict(classes=classes, mean=config.DATA.MEAN, std=config.DATA.STD) if isinstance(model, VSSM) else {}
    return _Source(model, list(image_size(config)) if isinstance(model, VSSM) else _SIZE, facts)


def _told(config: CfgNode) -> list[str]:
    """The classes' names where the data tells them, which "class 3" does not."""
    names = class_names(config)
    return [] if names == [f"class {number}" for number in range(len(names))] else names
