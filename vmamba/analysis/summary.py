"""What a model is made of: its modules with parameters and shapes, its stages with their multiply-adds."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmamba.analysis import zoo
from vmamba.analysis.tables import markdown
from vmamba.files import write_text
from vmamba.models.flops import complexity
from vmamba.models.vssm import VSSM


def summary(model: str, weights: str | None, size: int, depth: int, output: str | None) -> str:
    """Print, return and, where `output` names a file, write the summary of a model of ours or of timm's.

    Raises UserError for an unknown model, or weights that do not fit.
    """
    subject = zoo.create(model, size, weights)
    cost = complexity(subject.model, size)
    parts = [
        f"{model}, {size} x {size} pixels: {cost.parameters:,} parameters ({cost.parameters_without_head:,} without "
        f"the head), {cost.macs / 1e9:.2f} G multiply-adds, {cost.activations / 1e6:.1f} M activations\n",
        markdown(modules(subject, size, depth)),
    ]
    if isinstance(subject.model, VSSM):
        parts.append(markdown(stages(subject.model, size)))
    text = "\n".join(parts)
    print(text, end="")
    if output:
        write_text(Path(output), text)
    return text


@torch.no_grad()
def modules(subject: zoo.Subject, size: int, depth: int) -> list[dict[str, Any]]:
    """A row for every module down to `depth` names deep: its class, parameters and the shape it gives for one image."""
    shapes: dict[str, tuple[int, ...]] = {}
    chosen = {name: module for name, module in subject.model.named_modules() if name.count(".") < depth}

    def remember(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in chosen.items()]
    subject.model(torch.zeros(1, subject.in_chans, size, size))
    for handle in handles:
        handle.remove()
    return [
        {
            "module": name or "(all)",
            "class": type(module).__name__,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "output": " x ".join(map(str, shapes[name])) if name in shapes else None,
        }
        for name, module in chosen.items()
    ]


def stages(model: VSSM, size: int) -> list[dict[str, Any]]:
    """A row a stage, the downsampling to it (the stem before the first) included, and one for the classifier."""
    rows, parameters, macs = [], 0, 0
    for number, stage in enumerate(model.layers):
        start = copy.deepcopy(model)
        start.prune_intermediate_layers([number], prune_norm=True)
        cost = complexity(start, size)  # of everything up to this stage
        rows.append(_stage(f"stage {number}", len(stage.blocks), cost.parameters - parameters, cost.macs - macs))
        parameters, macs = cost.parameters, cost.macs
    cost = complexity(model, size)
    return [*rows, _stage("classifier", None, cost.parameters - parameters, cost.macs - macs)]


def _stage(name: str, blocks: int | None, parameters: int, macs: int) -> dict[str, Any]:
    return {"stage": name, "blocks": blocks, "parameters": parameters, "multiply-adds (G)": macs / 1e9}
