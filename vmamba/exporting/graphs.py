"""ONNX: opset 18, operators of the standard alone.

A scan's recurrence is one Scan for all routes, whose body is as small as its states allow; what it reads is made by
`vmamba_kernels.graph`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.exporting.programs import recorded, set_backend, told
from vmamba.exporting.weights import ABOUT
from vmamba.files import write_atomically
from vmamba.models.backbone import Backbone
from vmamba.models.backbones import TimmBackbone

OPSET = 18


def write(path: Path, model: nn.Module, images: Tensor, dynamic: Sequence[str], about: Mapping[str, Any]) -> None:
    """Input `images`; output `logits`, or of a backbone a map of each stage.  Metadata `vmamba` holds `about`, JSON.

    Raises UserError where PyTorch cannot write the model so: 2.6 few models, and those with nothing open.
    """
    import onnx

    from vmamba.exporting.translations import TRANSLATIONS

    set_backend(model, "graph")
    try:
        program = torch.onnx.export(
            recorded(model, images, dynamic),
            dynamo=True,
            input_names=["images"],
            output_names=output_names(model),
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        remedy = ", or leave nothing open (dynamic=(), --dynamic alone)" if dynamic else ""
        raise UserError(
            f"PyTorch {torch.__version__} cannot write this model as ONNX ({str(cause).splitlines()[0]}); "
            f"use a newer one{remedy}"
        ) from error
    proto = program.model_proto
    _tidy(proto.graph)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {ABOUT: told(model, images, dynamic, about)})
    onnx.checker.check_model(proto, full_check=True)
    write_atomically(path, lambda file: file.write(proto.SerializeToString()))


def output_names(model: nn.Module) -> list[str]:
    if isinstance(model, Backbone):
        return [f"stage{stage}" for stage in model.out_indices]
    return [f"stage{stage}" for stage in range(len(model.channels))] if isinstance(model, TimmBackbone) else ["logits"]


def _tidy(graph: Any) -> None:
    """Call the open sizes of the images by their names, and take out notes of where nodes come from, which are paths of
    this machine."""
    sides = graph.input[0].type.tensor_type.shape.dim
    called = {side.dim_param: name for side, name in zip(sides, ("batch", "channels", "height", "width"), strict=True)}
    values = [*graph.value_info, *graph.input, *graph.output]
    for side in (side for value in values for side in value.type.tensor_type.shape.dim):
        if side.dim_param:
            side.dim_param = re.sub(r"\w+", lambda match: called.get(match[0], match[0]), side.dim_param)
    for each in (graph, *values, *_nodes(graph)):
        del each.metadata_props[:]


def _nodes(graph: Any) -> Iterator[Any]:
    """Those of the graphs inside too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def check_installed(what: str, *packages: str) -> None:
    """Raises UserError where one of the packages that `what` needs is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}; pip install -e '.[export]'")
