"""What `python export.py` does: a model by name, or that of a checkpoint of any task, as a file."""

from collections.abc import Sequence
from pathlib import Path

from vmamba.analysis import zoo
from vmamba.analysis.prediction import file_of, load_model
from vmamba.errors import UserError
from vmamba.exporting import export
from vmamba.exporting.publishing import card_text, write_card
from vmamba.files import check_keeps, check_writable
from vmamba.models.variants import TIMM

PARTS = ("whole", "backbone")


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
    card: bool = False,
    licence: str = "other",
) -> Path:
    """Write a model to the file `output`, see `vmamba.export`.

    Args:
        model: a name of `vmamba.list_models()` or `timm.list_models()`: random weights.
        checkpoint: in its place, what `vmamba.load_model` takes, with `cfg`, `names` and `weights`.
        part: "backbone" of a detector or segmenter alone.
        format, size, dynamic, spelling: as of `vmamba.export`.
        card: write the run's card beside it, with this `licence`: see `publishing.write_card`.

    Returns the path.  Raises UserError as `vmamba.export` does, for a checkpoint that cannot be read, and where it or
    the state of another run would be written over.
    """
    if not output:
        raise UserError("--output is missing; name the file to be written, such as model.onnx")
    if (model is None) == (checkpoint is None):
        raise UserError("give one of --model, for random weights, and --checkpoint")
    if card and model is not None:
        raise UserError("--card is of a run, and --model gives random weights; leave one out")
    if model is not None:
        if cfg or names or weights != "auto":
            raise UserError("--cfg, --names and --weights are of a --checkpoint; leave them out beside --model")
        whole = zoo.create(model.removeprefix(TIMM), size or 224).model
    else:
        file = file_of(checkpoint)
        check_keeps(filter(None, [file, cfg, names]), output)
        whole = load_model(file, cfg=cfg, names=names, weights=weights)
    if part == "backbone":
        if not hasattr(whole, "backbone"):
            raise UserError(
                "--part backbone is of detectors and segmenters, and this is a classifier; in Python a "
                "vmamba.Backbone of it is exported likewise"
            )
        whole = whole.backbone
    check_writable(output)
    if card:
        card_text(checkpoint, output, licence, weights)  # refuses what cannot be before anything is written
    path = export(whole, output, format=format, size=size, dynamic=dynamic, spelling=spelling)
    if card:
        print(write_card(checkpoint, path, licence, weights))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return path
