"""What `vmamba.export` wrote for other programs, run here; what it was not made for is said before it runs."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.analysis.classes import class_names
from vmamba.config import restored
from vmamba.errors import UserError
from vmamba.exporting import programs
from vmamba.exporting.graphs import check_installed
from vmamba.exporting.weights import ABOUT
from vmamba.files import cannot_read
from vmamba.models.formats import damaged_description, description, program_format
from vmamba.text import printable
from vmamba_kernels import no_autocast
from vmamba_kernels.private import aoti_load_package

Run = Callable[[Tensor], Any]


class Program(nn.Module):
    """A program as `vmamba.predict` takes it: `config` and `class_names` as `vmamba.load_model` gives them, None and ()
    where its file does not tell.

    Args:
        path: of its file, for what it says.
        run: from images to what the model gave.
        about: what the file tells: see `programs.told`.

    Raises UserError where the config that it tells is none, or the names are not one for each of its classes.
    """

    def __init__(self, path: Path, run: Run, about: Mapping[str, Any]):
        super().__init__()
        self.path, self._run, self._sizes = path, run, about["images"]
        told, names = about.get("config", {}), about.get("classes", ())
        try:
            self.config = restored(told) if told.get("MODEL") else None
        except UserError as error:
            raise damaged_description(path, str(error)) from error
        if self.config and names and len(names) != self.config.MODEL.NUM_CLASSES:
            raise damaged_description(path, f"{len(names)} names for {self.config.MODEL.NUM_CLASSES} classes")
        self.class_names = names or (class_names(self.config) if self.config else ())

    @property
    def takes(self) -> str:
        """The sizes of its images, in words."""
        words = [
            str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            for least, most in self._sizes
        ]
        return f"({', '.join(words)})"

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images where it takes no others; None where they are open."""
        (height, tallest), (width, widest) = self._sizes[2:]
        return (height, width) if (height, width) == (tallest, widest) else None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """(B, channels, H, W) float32 on the CPU -> what the model gave: logits, or a map of each stage.

        Raises UserError for images of a shape, dtype or device that it was not made for.
        """
        if not isinstance(images, Tensor):
            raise UserError(f"the images are a {type(images).__name__}; '{printable(self.path)}' takes a tensor")
        if images.layout != torch.strided or images.is_nested:
            kind = "nested" if images.is_nested else str(images.layout).removeprefix("torch.")
            raise UserError(f"the images are {kind}, and '{printable(self.path)}' takes a dense tensor; give it such")
        fits = images.dim() == len(self._sizes) and all(
            least <= size and (most is None or size <= most)
            for size, (least, most) in zip(images.shape, self._sizes, strict=True)
        )
        if not fits:
            raise UserError(
                f"the images have the shape {tuple(images.shape)}, and '{printable(self.path)}' takes {self.takes}; "
                f"give it such, or export the model for yours"
            )
        if images.dtype != torch.float32 or images.device.type != "cpu":
            raise UserError(
                f"the images are {str(images.dtype).removeprefix('torch.')} on {images.device}, and "
                f"'{printable(self.path)}' takes float32 on the CPU; give it images.float().cpu()"
            )
        with no_autocast("cpu"):  # whose casts a recorded program does not expect
            return self._run(images.detach().resolve_neg().contiguous())

    @property
    def tells_nothing(self) -> str:
        """What `vmamba.predict` says where there is no config."""
        return (
            f"'{printable(self.path)}' does not tell what its images and classes are, as that of a backbone or of a "
            f"model that no config builds; call the program itself, with a tensor of images as its model takes them"
        )

    def extra_repr(self) -> str:
        return f"'{self.path}', images {self.takes}"

    def __reduce__(self) -> tuple[Callable[[Path], "Program"], tuple[Path]]:
        """A copy, and what another process is given, is the file's program, loaded from there again."""
        return load_program, (self.path.absolute(),)


def load_program(path: str | Path) -> Program:
    """A program that `vmamba.export` wrote, ready to be called with images, on the CPU: ONNX (by onnxruntime), of
    torch.export, or of AOTInductor, which is machine code and so for files that you trust.

    Raises UserError for a file that cannot be read or run here, or is none of these.
    """
    if not isinstance(path, (str, PathLike)):
        raise UserError(f"path is {path!r:.60} ({type(path).__name__}); give that of a program's file")
    path = Path(path)
    try:
        format = program_format(path)
    except (OSError, ValueError) as error:
        raise cannot_read(path, error) from error
    if not format:
        raise UserError(
            f"'{printable(path)}' is no program of ONNX, torch.export or AOTInductor, or not a whole one; files of "
            f"weights are for vmamba.load_model"
        )
    if format == "onnx":
        check_installed(f"running '{printable(path)}'", "onnxruntime")
    try:
        with programs.as_by_default():
            run, told = _OPENERS[format](path)
    except Exception as error:  # of three libraries, each with its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"'{printable(path)}' cannot be run here ({reason}); export the model again on this machine"
        ) from error
    about = description(told, path) if told else {}
    if "images" not in about:
        raise UserError(
            f"'{printable(path)}' does not tell what images it takes: not vmamba.export wrote it, or an earlier one; "
            f"export the model again"
        )
    return Program(path, run, about)


def _onnx(path: Path) -> tuple[Run, str | None]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def run(images: Tensor) -> Tensor | list[Tensor]:
        found = [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]
        return found[0] if names == ["logits"] else found

    return run, session.get_modelmeta().custom_metadata_map.get(ABOUT)


def _recorded(path: Path) -> tuple[Run, str | None]:
    extra = {ABOUT: ""}
    program = torch.export.load(path, extra_files=extra).module()
    return program.__call__, extra[ABOUT]  # the call alone: as a part of another module it would be no program any more


def _compiled(path: Path) -> tuple[Run, str | None]:
    program = aoti_load_package(str(path))
    return program, program.get_metadata().get(ABOUT)


_OPENERS: Mapping[str, Callable[[Path], tuple[Run, str | None]]] = {
    "onnx": _onnx,
    "torch": _recorded,
    "aoti": _compiled,
}  # from a file to what runs it, and what it tells
