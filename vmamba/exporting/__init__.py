"""Models as files for other programs: bare weights, torch.export's programs, AOTInductor's packages, ONNX."""

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.config import image_size
from vmamba.detection.mask_rcnn import MaskRCNN
from vmamba.errors import UserError, unknown
from vmamba.exporting import graphs, programs, rebuilding, weights
from vmamba.exporting.descriptions import size_of, timm_name
from vmamba.exporting.places import check_place
from vmamba.models.backbone import Backbone
from vmamba.models.backbones import TimmBackbone
from vmamba.models.pretrained import channels_of
from vmamba.models.variants import check_size, timm_settings
from vmamba.models.vssm import VSSM
from vmamba.models.weights import unwrapped
from vmamba.segmentation.upernet import UperNet
from vmamba.values import Takes

WEIGHTS = ("safetensors", "pth")
SUFFIXES = {"safetensors": ".safetensors", "pth": ".pth", "torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
DYNAMIC = ("batch", "size")
SPELLINGS = ("ours", "released", "january")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TAKES = {"classes": Takes(([str],)), "mean": Takes(([float],)), "std": Takes(([float],), above=0)}


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    size: int | Sequence[int] | None = None,
    dynamic: str | Sequence[str] = ("batch",),
    spelling: str = "ours",
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Write `model` to a file for other programs.

    Args:
        model: what `create_model` or `load_model` gives, a classifier of timm's create_model (`Vim` is one), a
            `Backbone` (its file gives the maps of its stages) or a segmenter, wrapped or not; its weights on any
            device.  It is left as it is; what is written is in eval mode, on the CPU.
        path: of the file.
        format: None takes it from the suffix.  "safetensors" and "pth" hold the weights, and a classifier's config;
            "torch" (.pt2) is a program of torch.export, "aoti" one compiled by AOTInductor, also .pt2, so asked for by
            name; "onnx" an ONNX model of opset 18.  These three are not recorded for training; `load_program` runs
            them.
        size: a side of the images in pixels, or (height, width); None: that of a loaded classifier's run or of timm's
            model, or 224.
        dynamic: what of the images a program leaves open, of "batch" and "size"; see `programs.open_sides`.
        spelling: of weights: "ours", "released" or "january", see `to_released`.
        classes: their names, which the file keeps, in weights and ONNX; None: those that a loaded model has.
        mean, std: of a channel of the images, values in 0..1, likewise; None: of a loaded model's run, timm's of its
            models, or ImageNet's (one number, the mean of its three, where the images have others than three channels).

    Returns the path.  Raises UserError, before any work, for what cannot be exported, and why, and where another
    file than one of this function's would be written over.
    """
    if not isinstance(path, (str, PathLike)):
        raise UserError(f"path is {path!r:.60} ({type(path).__name__}); give that of the file to be written")
    path, model = Path(path), _known(model)
    format = _format(path, format)
    dynamic = _dynamic(dynamic)
    if spelling not in SPELLINGS:
        raise unknown("spelling", spelling, SPELLINGS)
    facts = _facts(model)
    for name, value in dict(classes=classes, mean=mean, std=std).items():
        if value is not None:
            facts[name] = TAKES[name].check(name, value.tolist() if hasattr(value, "tolist") else value)
    height, width = facts["size"] = _sides(facts["size"] if size is None else size)
    about = weights.about(model, **facts, needed=format in WEIGHTS)
    if format in WEIGHTS:
        held = weights.spelt(model, spelling)
        check_place(path)
        if "MODEL" in about.get("config", {}):
            rebuilding.check(model, about["config"])
        weights.write(path, format, held, about)
        return path
    if spelling != "ours":
        raise UserError(f"spelling is '{spelling}', and a file of {format} has no names of weights; leave it out")
    _check_program(model, format, dynamic)
    check_place(path)
    with programs.as_by_default():
        frozen = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        programs.set_backend(frozen, "reference")
        images = _images(frozen, height, width)
        if format == "onnx":
            graphs.write(path, frozen, images, dynamic, about)
        elif format == "torch":
            programs.write(path, frozen, images, dynamic, about)
        else:
            programs.write_compiled(path, frozen, images, dynamic, about)
    return path


def _known(model: object) -> nn.Module:
    inside = unwrapped(model) if isinstance(model, nn.Module) else model
    ours = isinstance(inside, (VSSM, Backbone, TimmBackbone, UperNet, MaskRCNN))
    if not ours and not (isinstance(inside, nn.Module) and timm_name(inside)):
        raise UserError(
            f"this is a {type(inside).__name__}; export takes what create_model, create_segmenter and Backbone give, "
            f"and classifiers of timm.create_model"
        )
    for name, value in inside.state_dict().items():
        if not isinstance(value, Tensor) or value.is_quantized:
            raise UserError(
                f"'{name}' is quantised; export the model as it was before (of ONNX files onnxruntime makes quantised "
                f"ones: docs/export.md)"
            )
    return inside


def _facts(model: nn.Module) -> dict[str, Sequence[Any]]:
    """Size, mean and deviation of the images, and the classes' names, as far as `load_model` has left them."""
    (mean, std), size, classifies = IMAGENET, (224, 224), isinstance(model, VSSM) or bool(timm_name(model))
    if timm_name(model):
        settings = timm_settings(timm_name(model))
        mean, std, size = settings.mean, settings.std, size_of(model) or settings.input_size[1:]
    if classifies and channels_of(model) != len(mean):
        mean, std = ([sum(values) / len(values)] for values in (mean, std))
    facts: dict[str, Sequence[Any]] = dict(size=size, mean=mean, std=std, classes=())
    config, classes = getattr(model, "config", None), getattr(model, "class_names", ())
    if len(classes) == getattr(model, "num_classes", None):  # another head may have come since
        facts["classes"] = classes
    if isinstance(config, CfgNode):
        facts |= dict(mean=config.DATA.MEAN, std=config.DATA.STD)
        facts |= dict(size=image_size(config)) if classifies else {}
    return facts


def _format(path: Path, format: str | None) -> str:
    if format is None:
        found = [name for name, suffix in SUFFIXES.items() if suffix == path.suffix]
        if not found:
            known = ", ".join(dict.fromkeys(SUFFIXES.values()))
            raise UserError(f"the suffix of '{path}' says no format; use one of {known}, or give the format")
        return found[0]
    if format not in SUFFIXES:
        raise unknown("format", format, SUFFIXES)
    if path.suffix != SUFFIXES[format]:
        raise UserError(f"'{path}' is to be of the format {format}; let its name end in {SUFFIXES[format]}")
    return format


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    size = Takes((int, [int]), at_least=1, at_most=2**15, length=2).check("size", size)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _dynamic(dynamic: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(dynamic, (str, list, tuple, set, frozenset)):
        raise UserError(
            f"dynamic is {dynamic!r:.60} ({type(dynamic).__name__}); give a list of {' and '.join(DYNAMIC)}"
        )
    dynamic = (dynamic,) if isinstance(dynamic, str) else tuple(dynamic)
    for name in dynamic:
        if name not in DYNAMIC:
            raise unknown("word of dynamic", name, DYNAMIC)
    return dynamic


def _check_program(model: nn.Module, format: str, dynamic: Sequence[str]) -> None:
    """Raises UserError where no program can be recorded of the model."""
    if isinstance(model, MaskRCNN):
        raise UserError(
            "a detector gives as many boxes as it finds, which no recorded program does; export its maps: "
            "vmamba.export(model.backbone, ...), or --part backbone"
        )
    if "size" in dynamic and (isinstance(model, (UperNet, TimmBackbone)) or timm_name(model)):
        raise UserError(
            f"a {type(model).__name__} can be recorded for one size of images alone (its pooling, padding or positions "
            f"may depend on it); leave 'size' out of dynamic"
        )
    if "size" in dynamic and any(isinstance(each, VSSM) and each.pos_embed is not None for each in model.modules()):
        raise UserError(
            "a model with pos_embed resizes its map by the size of the images, so it can be recorded for one alone; "
            "leave 'size' out of dynamic"
        )
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if kinds != {"float32"}:
        raise UserError(
            f"the weights are {', '.join(sorted(kinds))}, and a program is recorded in float32; export model.float() "
            f"(docs/export.md says how files of float16 are made)"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("the weights are on the meta device, which holds no numbers; create the model on the CPU")
    if format == "onnx":
        graphs.check_installed("the format onnx", "onnx", "onnxscript")
    if format == "aoti":
        programs.check_compiler()


@torch.no_grad()
def _images(model: nn.Module, height: int, width: int) -> Tensor:
    """Two images to record a program with.  Raises UserError where the model does not take them."""
    whole = model.backbone if isinstance(model, UperNet) else model
    whole = whole.model if isinstance(whole, Backbone) else whole
    channels = whole.options.get("in_chans", 3) if isinstance(whole, TimmBackbone) else channels_of(whole)
    if timm_name(model):
        check_size(timm_name(model), model, channels, (height, width))
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0), device="cpu")
    model(images[:1])
    return images
