"""The mean of several checkpoints' weights: of one run's epochs (arXiv 1803.05407), or of fine-tunings from one start
(model soups, arXiv 2203.05482)."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vmamba.analysis.tables import write_tensors
from vmamba.errors import UserError
from vmamba.files import check_keeps, check_replaces, check_writable
from vmamba.models.formats import read_file
from vmamba.models.pretrained import Checkpoint, calls_otherwise, open_checkpoint
from vmamba.text import printable

logger = logging.getLogger("vmamba")


def average(
    checkpoints: Sequence[str], *, weights: str = "auto", output: str = "output/average.pth"
) -> dict[str, Tensor]:
    """Write the mean of the weights, with the first one's config, as a checkpoint that `--eval --resume`,
    `--pretrained` and `predict.py` take.

    Args:
        checkpoints: of runs of one model, of any task, or released files; an address is downloaded.
        weights: as of `vmamba.load_checkpoint`.

    Returns the mean, computed in float64 and of the first one's dtypes; of whole numbers, such as batch norms' counts,
    the last one's.  Raises UserError for fewer than two, for one given twice, for files of different models, and where
    what is no average would be written over.
    """
    if len(checkpoints) < 2:
        raise UserError("an average needs two checkpoints at least; name more")
    places = [os.path.realpath(path) for path in checkpoints]
    for path, place in zip(checkpoints, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"'{printable(path)}' is given twice, and would count twice; name each checkpoint once")
    check_keeps(checkpoints, output)
    check_writable(output)
    check_replaces(output, lambda path: "averaged" in read_file(path), "average of checkpoints")
    found = [open_checkpoint(path, weights) for path in checkpoints]
    for other in found[1:]:
        _check_alike(found[0], other)
    mean = {name: _mean([each.whole[name] for each in found]) for name in found[0].whole}
    content = {"model": mean, "averaged": [str(path) for path in checkpoints]}
    named = [each for each in found if each.classes]
    if named:
        content["classes"] = list(named[0].classes)
    for sentence in filter(None, (calls_otherwise(each.path, each.classes, named[0].classes) for each in named)):
        logger.warning(sentence)
    write_tensors(Path(output), content | ({"config": found[0].config} if found[0].config else {}))
    print(f"the mean of {len(found)} checkpoints is in {output}")
    return mean


def _mean(weights: Sequence[Tensor]) -> Tensor:
    if not weights[0].is_floating_point():
        return weights[-1]
    total = weights[0].double()
    for weight in weights[1:]:
        total = total + weight.double()
    return (total / len(weights)).to(weights[0].dtype)


def _check_alike(one: Checkpoint, other: Checkpoint) -> None:
    for name in one.whole.keys() | other.whole.keys():
        shapes = [tuple(each.whole[name].shape) if name in each.whole else "nothing" for each in (one, other)]
        if shapes[0] != shapes[1]:
            files = f"'{printable(other.path)}' is of another model than '{printable(one.path)}'"
            raise UserError(
                f"{files}: {name} is {shapes[1]} there and {shapes[0]} here; average checkpoints of one model"
            )
