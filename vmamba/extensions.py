"""What a module of the user's own adds by being imported (IMPORT in a config): losses and data sets by name.

Models are added to timm's own registry, with `timm.models.register_model`.  docs/extending.md has an example of each.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vmamba.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

LOSSES: dict[str, Callable[..., Any]] = {}  # see `register_loss`
DATASETS: dict[str, Callable[..., Any]] = {}  # see `register_dataset`


def register_loss(name: str) -> Callable[[Function], Function]:
    """Decorates a loss of classification, TRAIN.LOSS `name`: (logits, targets) -> losses of the images (B,).

    Logits are (B, classes) float32; targets (B, classes) float32, soft: smoothing and mixup are in them.
    Raises UserError for a name that is taken.
    """
    return _register(LOSSES, "loss", name, ("cross_entropy", "bce"))


def register_dataset(name: str) -> Callable[[Function], Function]:
    """Decorates a data set of classification, DATA.DATASET `name`: (config, training) -> a sequence of (image, label).

    An image is Pillow's, a path or an open file; `training` says which part is asked for.  What is given may tell, as
    torchvision's data sets do, `classes`, their names, and `targets`, the labels of all.
    Raises UserError for a name that is taken.
    """
    return _register(DATASETS, "data set", name, ("imagenet", "digits", "cifar10", "cifar100"))


def _register(known: dict, kind: str, name: str, ours: Sequence[str]) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        if name in known or name in ours or "/" in name:
            raise UserError(f"the name '{name}' of a {kind} is taken; choose another")
        known[name] = function
        return function

    return register


def not_imported(names: Sequence[str]) -> list[str]:
    """Of the modules that a config names, those that nothing has imported."""
    return [name for name in names if name not in sys.modules]


def import_modules(names: Sequence[str]) -> None:
    """Import modules, which may lie in the working directory; what they raise themselves is theirs.

    Raises UserError where there is none of a name.
    """
    here = os.getcwd()
    if names and here not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        if name.startswith(".") or "/" in name:
            raise UserError(
                f"IMPORT names '{name}', which is no module; give its name, without .py and with dots for slashes"
            )
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # of a module that this one imports
            remedy = "; give its name without .py" if name.endswith(".py") else ""
            raise UserError(
                f"IMPORT names '{name}', and there is no such module in '{here}', nor where Python looks (PYTHONPATH)"
                f"{remedy}"
            ) from error
