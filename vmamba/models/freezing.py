"""Parts of a model that stay as they are: they get no gradient and compute as in evaluation, so that norms keep their
statistics and nothing is dropped at random."""

from collections.abc import Sequence

from torch import nn

from vmamba.errors import UserError, nearest
from vmamba.text import some

ALL_BUT_HEAD = "all_but_head"  # stands for every name but the head's: what is left to train is a linear probe


def freeze(model: nn.Module, parts: Sequence[str], key: str = "TRAIN.FREEZE") -> None:
    """Freeze `parts`, names of modules or parameters, as the config's `key` gives them.

    Raises UserError for a name that the model does not have, and where nothing would be left to train.
    """
    mark(model, parts, key)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"{key} is {list(parts)}, which is the whole model; leave something to train")


def mark(model: nn.Module, parts: Sequence[str], key: str) -> None:
    """`freeze`, perhaps of the whole model, which may be a part itself."""
    names = [name for part in parts for name in (_all_but_head(model, key) if part == ALL_BUT_HEAD else [part])]
    modules = dict(model.named_modules())
    for part in names:
        found = [weight for name, weight in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not found:
            near = nearest(part, [*modules, ALL_BUT_HEAD])
            has = f"did you mean '{near}'?" if near else f"the model has {some([*dict(model.named_children())])}"
            raise UserError(f"{key} names '{part}', which is no part of the model that is trained; {has}")
        for weight in found:
            weight.requires_grad_(False)
        if part in modules:
            modules[part].is_frozen = True
    keep(model)


def thaw(model: nn.Module) -> None:
    """Let the modules that were frozen be trained again, in the mode that the model is in."""
    for module in [each for each in model.modules() if getattr(each, "is_frozen", False)]:
        del module.is_frozen
        module.requires_grad_(True).train(model.training)


def train(model: nn.Module) -> None:
    """Put the model into training mode, its frozen parts into that of evaluation."""
    model.train()
    keep(model)


def keep(model: nn.Module) -> None:
    """Put the frozen parts into the mode of evaluation."""
    for module in model.modules():
        if getattr(module, "is_frozen", False):
            nn.Module.train(module, False)


def _all_but_head(model: nn.Module, key: str) -> list[str]:
    """The largest parts in which nothing of the head is."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else nn.Identity()
    heads = head if isinstance(head, tuple) else (head,)  # of a distilled model there are two
    kept = {id(weight) for each in heads for weight in each.parameters()}
    if not kept:
        raise UserError(f"{key} is {ALL_BUT_HEAD}, and this {type(model).__name__} has no head of classes; name parts")
    return _without(model, kept, "")


def _without(module: nn.Module, kept: set[int], path: str) -> list[str]:
    names = [f"{path}{name}" for name, weight in module.named_parameters(recurse=False) if id(weight) not in kept]
    for name, child in module.named_children():
        weights = {id(weight) for weight in child.parameters()}
        if weights & kept:
            names += _without(child, kept, f"{path}{name}.")
        elif weights:
            names.append(f"{path}{name}")
    return names
