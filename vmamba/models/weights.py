"""Loading a state dict so that wrong weights never load: every difference is listed, grouped, before anything moves."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vmamba.errors import UserError

# Where torch.compile, DataParallel (and averaging, and others), sharding and recomputing have what they wrap.
_INSIDE = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = re.compile(rf"(?<![^.])(?:{'|'.join(_INSIDE)})\.")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Load a state dict whose names, but for what wrappers put into them, shapes and kinds of numbers are the model's.

    Raises UserError, naming `source` and listing what is missing, unexpected, of another shape or no plain numbers of
    the model's kind, and loads nothing.
    """
    named, weights = model.state_dict(), without_wrappers(weights)
    own = without_wrappers(named)
    both = sorted(own.keys() & weights.keys())
    shapes = {
        name: f"file {tuple(weights[name].shape)}, model {tuple(own[name].shape)}"
        for name in both
        if not weights[name].is_nested and weights[name].shape != own[name].shape
    }
    kinds = {name: difference(weights[name], own[name]) for name in both if name not in shapes}
    differences = [
        _grouped("missing", dict.fromkeys(own.keys() - weights.keys(), "")),
        _grouped("unexpected", dict.fromkeys(weights.keys() - own.keys(), "")),
        _grouped("of another shape", shapes),
        _grouped("of another kind", {name: kind for name, kind in kinds.items() if kind}),
    ]
    if any(differences):
        raise UserError(f"'{source}' is of another architecture: {'; '.join(filter(None, differences))}")
    model.load_state_dict({name: weights[bare] for name, bare in zip(named, own, strict=True)})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, of one that torch.compile, DataParallel and their like may have wrapped."""
    inside = next((child for name, child in model.named_children() if name in _INSIDE), None)
    return model if inside is None else unwrapped(inside)


def without_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names without what wrappers of the model, or of its parts, put into them.

    Raises UserError where two weights would have one name.
    """
    bare: dict[str, Tensor] = {}
    for name, weight in state_dict.items():
        without = _WRAPPERS.sub("", name)
        if without in bare:
            raise UserError(f"a state dict holds '{without}' twice, wrapped and not; save one model alone")
        bare[without] = weight
    return bare


def is_plain(weight: Tensor) -> bool:
    """Whether it is a dense tensor that holds numbers."""
    dense = weight.layout is torch.strided and not weight.is_nested
    return dense and not weight.is_quantized and not weight.is_meta


def is_image(weight: Tensor) -> bool:
    """Whether it holds plain numbers in four dimensions, which can be resized or adapted."""
    return is_plain(weight) and weight.dim() == 4 and weight.is_floating_point() and weight.numel() > 0


def difference(weight: Tensor, own: Tensor) -> str:
    """Why `weight` cannot become `own` without loss; "" where it can.  Another width of the same numbers is none."""
    if own.is_meta:  # of a model without numbers, as long as the file has none either
        return "" if weight.is_meta else "the model is on the meta device, which holds no numbers"
    if not is_plain(weight):
        kinds = {"nested": weight.is_nested, "quantized": weight.is_quantized, "on the meta device": weight.is_meta}
        kind = next((kind for kind, is_so in kinds.items() if is_so), str(weight.layout))
        return f"file {kind}, model {str(own.dtype).removeprefix('torch.')}"
    if (weight.is_floating_point(), weight.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return f"file {weight.dtype}, model {own.dtype}".replace("torch.", "")
    if is_beyond(weight, own.dtype):
        return f"file {weight.dtype} with numbers that {own.dtype} cannot hold".replace("torch.", "")
    return ""


def is_beyond(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a plain weight holds finite numbers that are infinite in `dtype`."""
    if not weight.is_floating_point() or torch.finfo(weight.dtype).max <= torch.finfo(dtype).max:
        return False
    return bool((weight.isfinite() & weight.to(dtype).isinf()).any())


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
