"""Programs of torch.export, as they are and compiled by AOTInductor: PyTorch alone runs them."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.exporting.weights import ABOUT
from vmamba.files import write_atomically
from vmamba.models.mamba1d import Mamba1D
from vmamba.models.ss2d import Mixer2D
from vmamba.models.vssm import VSSM
from vmamba_kernels import no_autocast
from vmamba_kernels.private import UserError as RefusedByPyTorch
from vmamba_kernels.private import aoti_compile_and_package, list_options


def set_backend(model: nn.Module, backend: str) -> None:
    """Of every scan inside a model of any kind; convolutions are PyTorch's."""
    for module in model.modules():
        if isinstance(module, Mixer2D):
            module.backend = backend
        if isinstance(module, Mamba1D):
            module.scan_backend, module.conv_backend = backend, "torch"


@contextmanager
def as_by_default() -> Iterator[None]:
    """Inside it, tensors are made in float32, on the CPU, and no autocast is in force, whatever the caller has set:
    what is recorded is to be of the model alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False), no_autocast("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def open_sides(model: nn.Module) -> tuple[int, int]:
    """Least and most pixels of a side that a program leaves open, of a classifier or a backbone.

    The last stage has two pixels at least, since torch.export takes a size of one for a constant; the first one 1024 at
    most, for which the reference's rounds are enough.
    """
    inside = next(module for module in model.modules() if isinstance(module, VSSM))
    return inside.patch_size * 2 ** len(inside.layers), 1024 * inside.patch_size


def _open(name: str, least: int, most: int) -> object:
    """A size for torch.export.

    Of one with a name PyTorch wants proven that all it compared of it on the way holds for every size, and proves
    little; 2.6 has no other one with bounds.
    """
    unnamed = torch.export.Dim.DYNAMIC
    return unnamed(min=least, max=most) if callable(unnamed) else torch.export.Dim(name, min=least, max=most)


@torch.no_grad()
def recorded(model: nn.Module, images: Tensor, dynamic: Sequence[str]) -> torch.export.ExportedProgram:
    """`model` as a program, with the operators of its scans' backend.

    Args:
        images: two, to record with.
        dynamic: see `vmamba.export`.

    Raises UserError where PyTorch finds that what is to be open is not.
    """
    shape: dict[int, object] = {}
    if "batch" in dynamic:
        shape[0] = _open("batch", 1, 2**31 - 1)
    else:
        images = images[:1]
    if "size" in dynamic:
        least, most = open_sides(model)
        images = images.new_zeros((*images.shape[:2], 5 * least, 6 * least))
        shape |= {2: _open("height", least, most), 3: _open("width", least, most)}
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=(shape,), strict=False)
    except RefusedByPyTorch as error:
        if not dynamic:
            raise
        raise UserError(
            f"PyTorch {torch.__version__} cannot record this model with {' and '.join(dynamic)} open "
            f"({str(error).splitlines()[0]}); use a newer PyTorch, or leave 'size' out of dynamic, or both"
        ) from error
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def told(model: nn.Module, images: Tensor, dynamic: Sequence[str], about: Mapping[str, Any]) -> str:
    """`about` and what images the program of `model` takes, for `loading`: JSON.

    `images` has of each of their four sizes [least, most], null where there is no most.
    """
    sizes: list[list[int | None]] = [[size, size] for size in images.shape]
    sizes[0] = [1, None if "batch" in dynamic else 1]
    if "size" in dynamic:
        sizes[2:] = [list(open_sides(model))] * 2
    return json.dumps({**about, "images": sizes})


def write(path: Path, model: nn.Module, images: Tensor, dynamic: Sequence[str], about: Mapping[str, Any]) -> None:
    """For `torch.export.load(path).module()(images)`, and `load_program`."""
    program, content = recorded(model, images, dynamic), BytesIO()
    extra = {ABOUT: told(model, images, dynamic, about)}
    # To memory: where a file fails it, as on a full disk, the process ends.
    torch.export.save(program, content, extra_files=extra)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def write_compiled(
    path: Path, model: nn.Module, images: Tensor, dynamic: Sequence[str], about: Mapping[str, Any]
) -> None:
    """For PyTorch's `aoti_load_package(path)(images)` on a CPU of this kind, and `load_program`."""
    program = recorded(model, images, dynamic)
    configs: dict[str, Any] = {"aot_inductor.metadata": {ABOUT: told(model, images, dynamic, about)}}
    if "aot_inductor.check_lowerbound" in list_options():  # an open batch would have to be of two images or more
        configs["aot_inductor.check_lowerbound"] = False
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "model.pt2"))
        package = Path(aoti_compile_and_package(program, package_path=file, inductor_configs=configs))
        write_atomically(path, lambda file: file.write(package.read_bytes()))


def check_compiler() -> None:
    """Raises UserError where AOTInductor finds no compiler of C++."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"the format aoti needs a compiler of C++, and there is no '{compiler}'; install one, or name it in CXX, "
            f"or use the format torch"
        )
