"""The models that are analysed: ours or timm's, by name, with weights from a file or random ones.

What a picture or a table says of a model and of its weights is said here.  "ImageNet" is said of files that are known:
the released ones, and timm's by their tags.  Of a run's weights its own config tells the data; of others nobody does.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import timm
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.analysis.tables import parameters
from vmamba.errors import UserError, unknown
from vmamba.models.download import is_url
from vmamba.models.formats import read_file
from vmamba.models.pretrained import Checkpoint, load_checkpoint, load_pretrained, local_file
from vmamba.models.variants import TIMM, VARIANTS, build_model, check_size, create_model, list_models, timm_settings
from vmamba.models.vssm import VSSM
from vmamba.models.weights import load_weights, without_wrappers
from vmamba.text import counted, printable

UNTRAINED = "random weights"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of a channel


@dataclass(frozen=True)
class Subject:
    """A model under analysis, in eval mode."""

    name: str
    model: nn.Module
    weights: str  # what they are and what they were trained on
    options: Mapping[str, Any] = field(default_factory=dict)  # of the model, where they are not the variant's
    in_chans: int = 3
    mean: Sequence[float] = IMAGENET[0]  # of the images it was trained on, values in 0..1
    std: Sequence[float] = IMAGENET[1]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def title(self) -> str:
        """The name with the changed options: "vmamba_digits (d_state=8)"."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name} ({options})" if options else self.name

    @property
    def facts(self) -> str:
        """ "0.139M parameters, trained on digits (10 classes)"."""
        return f"{parameters(self.parameters)}, {self.weights}"


def create(name: str, size: int, weights: str | Path | None = None, backend: str = "auto") -> Subject:
    """A model for square images of `size` pixels a side.

    Args:
        name: of `vmamba.list_models()` or of `timm.list_models()`.
        weights: a checkpoint; one of our runs says itself what the model's options, classes and channels are.  For
            timm's models "pretrained" downloads timm's.
        backend: of the scans of our models.

    Raises UserError for an unknown name, a size that the model does not take, or weights that do not belong to it.
    """
    return _create(name, size, weights, backend, load=True)


def create_untrained(name: str, size: int, weights: str | Path | None) -> Subject:
    """The model that `weights` belongs to with random weights, always the same ones.  Raises UserError as `create`."""
    torch.manual_seed(0)
    return replace(_create(name, size, weights, "auto", load=False), weights=UNTRAINED)


def of_config(config: CfgNode) -> Subject:
    """The model of a run, its weights not loaded.  Raises UserError as `build_model` does."""
    channels = config.MODEL.IN_CHANS
    start = config.MODEL.RESUME or config.MODEL.PRETRAINED  # whose own data is not told
    mean, std = (list(value) * channels if len(value) == 1 else value for value in (config.DATA.MEAN, config.DATA.STD))
    return Subject(
        config.MODEL.NAME,
        build_model(config),
        f"trained on {data_of(config)}{f', from {Path(start).name}' if start else ''}",
        changed_options(config.MODEL.NAME, config.MODEL.OPTIONS),
        channels,
        mean,
        std,
    )


def data_of(config: CfgNode) -> str:
    """The data of a config by its name and classes: "digits (10 classes)"; of images in a folder the folder's name."""
    name, path = config.DATA.DATASET, config.DATA.DATA_PATH
    folder = f"folder '{Path(path).name or path}'"
    if name == "imagenet":  # the format, whatever the images show
        name = folder
    elif "/" in name and path:  # opened by timm
        name = f"{name} in {folder}"
    return f"{name} ({counted(config.MODEL.NUM_CLASSES, 'class', 'classes')})"


def changed_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` whose values are not the ones that the variant `name` has."""
    defaults = {option: parameter.default for option, parameter in inspect.signature(VSSM).parameters.items()}
    own = defaults | (VARIANTS[name].options if name in VARIANTS else {})
    return {option: value for option, value in options.items() if _plain(value) != _plain(own.get(option))}


def pair_weights(models: Sequence[str], weights: Sequence[str]) -> list[str | None]:
    """One checkpoint a model, in order; "-" stands for none.  Raises UserError when the numbers differ."""
    if weights and len(weights) != len(models):
        raise UserError(
            f"--weights names {counted(len(weights), 'file')} for {counted(len(models), 'model')}; "
            f"name one a model, - for none"
        )
    return [None if path == "-" else path for path in weights] or [None] * len(models)


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one.

    Raises UserError for a device that PyTorch does not know or reach, and for "meta", which computes nothing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # lists of backends follow
        raise UserError(f"--device {name} is not to be had ({reason}); use cpu") from error
    if device.type == "meta":
        raise UserError(f"--device {name} holds no numbers to compute with; use cpu")
    return device


def _create(name: str, size: int, weights: str | Path | None, backend: str, load: bool) -> Subject:
    if name in list_models():
        subject = _ours(name, size, weights, backend, load)
    elif timm.is_model(name):
        subject = _timm(name, size, weights, load)
    else:
        raise unknown("model", name, [*list_models(), *timm.list_models()])
    subject.model.eval()
    return subject


def _ours(name: str, size: int, weights: str | Path | None, backend: str, load: bool) -> Subject:
    if weights is None:
        return Subject(name, create_model(name, img_size=size, backend=backend), UNTRAINED)
    checkpoint = load_checkpoint(weights)
    config = _config(checkpoint)
    if config is None:
        head = checkpoint.state_dict.get("classifier.head.weight")
        options = {} if head is None else {"num_classes": len(head)}
        subject = Subject(name, create_model(name, img_size=size, backend=backend, **options), "")
        subject = replace(subject, weights=_released(subject, weights) or _unknown(weights, subject.model))
    elif name != config.MODEL.NAME:
        raise UserError(f"'{weights}' holds a {config.MODEL.NAME}, not a {name}; name that model")
    else:
        subject = of_config(config)
        subject.model.set_backend(backend)
    if load:
        load_pretrained(subject.model, checkpoint)
    return subject


def _config(checkpoint: Checkpoint) -> CfgNode | None:
    """The config in a checkpoint of one of our runs; None in another file.

    Raises UserError for a run of another task, whose model is more than a classifier.
    """
    name = checkpoint.config.get("MODEL", {}).get("NAME", "")
    if name not in list_models() and not name.startswith(TIMM):
        return None
    task = checkpoint.config.get("TASK", "classification")
    if task != "classification":
        raise UserError(f"'{checkpoint.path}' is of a run of {task}, whose model is no classifier; see predict.py")
    return CfgNode(checkpoint.config)


def _released(subject: Subject, weights: str | Path) -> str | None:
    """What a released file is, known by its address or its name; None of another file."""
    variant = VARIANTS[subject.name]
    if variant.weights is None or subject.parameters != variant.parameters:
        return None
    name = Path(unquote(variant.weights)).name
    known = str(weights) == variant.weights if is_url(weights) else Path(weights).name == name
    return "released weights, trained on ImageNet (1,000 classes)" if known else None


def _unknown(weights: str | Path, model: nn.Module) -> str:
    classes = counted(model.num_classes, "class", "classes")
    return f"weights {Path(weights).name}, trained on unknown data ({classes})"


def _timm(name: str, size: int, weights: str | Path | None, load: bool) -> Subject:
    if weights not in (None, "pretrained"):
        content = read_file(local_file(weights))
        if isinstance(content, Mapping) and isinstance(content.get("config"), Mapping):  # else a file of timm's
            return _timm_of_run(name, size, weights, load)
    settings, weights = timm_settings(name), weights if load else None
    options = {"img_size": size} if settings.fixed_input_size else {}  # position embeddings, windows of that size
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained", **options)
    except Exception as error:  # of the network, the hub's libraries, the file
        if weights != "pretrained":
            raise
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UserError(f"cannot download timm's weights of {name} ({reason}); give a file of them") from error
    check_size(name, model, 3, (size, size))
    if weights is None:
        label = UNTRAINED
    elif weights == "pretrained":
        label = f"timm's weights {settings.tag} ({counted(model.num_classes, 'class', 'classes')})"
    else:
        label = _unknown(weights, model)
        load_weights(model, _timms_weights(weights), weights)
    return Subject(name, model, label, mean=settings.mean, std=settings.std)


def _timm_of_run(name: str, size: int, weights: str | Path, load: bool) -> Subject:
    """One that our loop has trained.  Raises UserError where the file is of another model."""
    checkpoint = load_checkpoint(weights)
    config = _config(checkpoint)
    there = checkpoint.config.get("MODEL", {}).get("NAME", "")
    if config is None or there != TIMM + name:
        raise UserError(f"'{printable(weights)}' holds a {printable(there)}, not a {name}; name that model")
    subject = of_config(config)
    check_size(name, subject.model, subject.in_chans, (size, size))
    if load:
        load_pretrained(subject.model, checkpoint)
    return replace(subject, name=name)


def _timms_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file of timm's, the averaged ones where there are, or a state dict."""
    weights = read_file(local_file(path))
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
            break
    named = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError(f"'{path}' holds no state dict of tensors alone, nor a file of timm's; save one")
    return without_wrappers(weights)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
