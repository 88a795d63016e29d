"""What a model is made of: its modules with parameters and shapes, its stages with their multiply-adds."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmamba.analysis import zoo
from vmamba.analysis.tables import markdown
from vmamba.files import check_replaces, check_writable, read_text, write_text
from vmamba.models.flops import complexity
from vmamba.models.vssm import VSSM

_BEGINNING = re.compile(r".* parameters \(.* without the head\), ")  # of what is written


def summary(
    model: str = "vmamba_tiny",
    *,
    weights: str | None = None,
    size: int = 224,
    depth: int = 2,
    output: str | None = None,
) -> str:
    """Print, return and, where `output` names a file, write the summary of a model of ours or of timm's.

    Its modules are listed down to `depth` names.  Raises UserError for an unknown model, weights that do not
    fit, and where another file would be written over.
    """
    if output:
        check_writable(output)
        check_replaces(output, lambda path: bool(_BEGINNING.match(read_text(path))), "summary of a model")
    subject = zoo.create(model, size, weights)
    cost = complexity(subject.model, size)
    parts = [
        f"{subject.title}, {subject.weights}; {size} x {size} pixels: {cost.parameters:,} parameters "
        f"({cost.parameters_without_head:,} without the head), {cost.macs / 1e9:.3g} G multiply-adds, "
        f"{cost.activations / 1e6:.3g} M activations\n",
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
    """A row for the stem, for each stage with the downsampling behind it, as in `modules`, and for the classifier."""
    wholes = [complexity(_start(model, number), size) for number in range(len(model.layers) + 1)]
    wholes.append(complexity(model, size))
    names = ["stem", *(f"stage {number}" for number in range(len(model.layers))), "classifier"]
    blocks = [None, *(len(stage.blocks) for stage in model.layers), None]
    rows, parameters, macs = [], 0, 0
    for name, count, whole in zip(names, blocks, wholes, strict=True):
        rows.append(
            {
                "part": name,
                "blocks": count,
                "parameters": whole.parameters - parameters,
                "multiply-adds (G)": (whole.macs - macs) / 1e9,
            }
        )
        parameters, macs = whole.parameters, whole.macs
    return rows


def _start(model: VSSM, stages: int) -> VSSM:
    """The stem and so many stages of `model`, without a classifier."""
    start = copy.deepcopy(model)
    start.layers = start.layers[:stages]
    start.classifier.norm = nn.Identity()
    start.reset_classifier(0, "")
    return start
