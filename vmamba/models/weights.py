"""Loading a state dict so that wrong weights never load: every difference is listed, grouped, before anything moves."""

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from vmamba.errors import UserError


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Load a state dict whose names and shapes are exactly the model's.

    Raises UserError, naming `source` and listing what is missing, unexpected or of another shape, and loads nothing.
    """
    own = model.state_dict()
    shapes = {
        name: f"file {tuple(weights[name].shape)}, model {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    }
    differences = [
        _grouped("missing", dict.fromkeys(own.keys() - weights.keys(), "")),
        _grouped("unexpected", dict.fromkeys(weights.keys() - own.keys(), "")),
        _grouped("of another shape", shapes),
    ]
    if any(differences):
        raise UserError(f"'{source}' is of another architecture: {'; '.join(filter(None, differences))}")
    model.load_state_dict(weights)


def _grouped(kind: str, details: Mapping[str, str], most: int = 12) -> str:
    """ "20 missing: layers.*.blocks.*.mlp.fc1.weight (10 keys), ..."; shapes are a stage's."""
    groups = defaultdict(list)
    for name, detail in sorted(details.items()):
        pattern = re.sub(r"(?<=blocks)\.\d+\." if detail else r"\.\d+\.", ".*.", name)
        groups[pattern, detail].append(name)
    lines = [_line(pattern, detail, names) for (pattern, detail), names in groups.items()]
    more = f" and {len(lines) - most} more groups" if len(lines) > most else ""
    return f"{len(details)} {kind}: {', '.join(lines[:most])}{more}" if details else ""


def _line(pattern: str, detail: str, names: list[str]) -> str:
    what = f"{pattern} ({len(names)} keys)" if len(names) > 1 else names[0]
    return f"{what}: {detail}" if detail else what
