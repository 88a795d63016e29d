"""Losses against what another model says of the same images: a trained one, or the average of the model's own
weights."""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.classification.class_names import warn_of_other_names
from vmamba.config import image_size, restored
from vmamba.errors import UserError
from vmamba.models.download import is_url
from vmamba.models.pretrained import load_pretrained, open_checkpoint
from vmamba.models.variants import TIMM, build_model, check_size, create_model, list_models
from vmamba.runtime.checkpoint import BEST, LAST
from vmamba.text import counted, printable

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the images that our released weights were trained on


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of logits (B, classes) float32 against the chances that a teacher's logits tell: MESA's loss
    (arXiv 2205.14083) as the vision models that report it train (arXiv 2405.16605)."""
    return F.cross_entropy(logits, teacher.float().softmax(1))


class Teacher:
    """A trained model of the same classes (DISTILL.TEACHER).  Raises UserError where there is none to be had.

    It sees what the model that is trained sees, mixed and erased, by its own mean and standard deviation.
    """

    def __init__(self, config: CfgNode, device: torch.device):
        self.kind, self.temperature = config.DISTILL.KIND, config.DISTILL.TEMPERATURE
        model, mean, std = open_teacher(config)
        for size in (image_size(config), *((side, side) for side in config.AUG.SIZES)):
            check_size(f"DISTILL.TEACHER {printable(config.DISTILL.TEACHER)}", model, config.MODEL.IN_CHANS, size)
        self.model = model.to(device).eval().requires_grad_(False)
        own = (torch.tensor(list(config.DATA[key]), device=device)[:, None, None] for key in ("MEAN", "STD"))
        its = (torch.tensor(list(values), device=device)[:, None, None] for values in (mean, std))
        (own_mean, own_std), (its_mean, its_std) = own, its
        self.scale, self.shift = own_std / its_std, (own_mean - its_mean) / its_std

    def loss(self, logits: Tensor, images: Tensor) -> Tensor:
        """Of logits (B, classes) float32 of images (B, C, H, W) as DATA.MEAN and STD made them: the mean over the
        images.  "soft" is Hinton's (arXiv 1503.02531), "hard" DeiT's (arXiv 2012.12877)."""
        with torch.no_grad():
            told = self.model(images * self.scale + self.shift).float()
        if self.kind == "hard":
            return F.cross_entropy(logits, told.argmax(1))
        t = self.temperature
        chances = (told / t).log_softmax(1)
        return F.kl_div((logits / t).log_softmax(1), chances, log_target=True, reduction="batchmean") * t**2


def open_teacher(config: CfgNode) -> tuple[nn.Module, list[float], list[float]]:
    """The model that DISTILL.TEACHER names, with its weights; mean and standard deviation of its images."""
    name = config.DISTILL.TEACHER
    if name in list_models() or name.startswith(TIMM):
        model, mean, std = _published(name, config)
    else:
        model, mean, std = _of_run(name, config)
    told = getattr(model, "num_classes", None)
    if told != config.MODEL.NUM_CLASSES:
        raise UserError(
            f"DISTILL.TEACHER '{printable(name)}' tells {counted(told or 0, 'class', 'classes')} apart, and "
            f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}; name a teacher of the same classes"
        )
    return model, mean, std


def _published(name: str, config: CfgNode) -> tuple[nn.Module, list[float], list[float]]:
    """Of our names the released weights; of timm's its own.  Of other than three channels the first convolution and
    the numbers of a channel are adapted as timm does the former."""
    channels = config.MODEL.IN_CHANS
    if name in list_models():
        model = create_model(name, pretrained=True, in_chans=channels)
        return model, *(of_channels(values, channels) for values in IMAGENET)
    try:
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True, in_chans=channels)
    except Exception as error:  # of the network, the hub's libraries, the name
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UserError(
            f"DISTILL.TEACHER {name} cannot be had with timm's weights ({reason}); check the name, or give a checkpoint"
        ) from error
    if not getattr(model, "pretrained_cfg", None):
        raise UserError(
            f"DISTILL.TEACHER {name} is of a module of your own and tells no weights to teach with; name the "
            f"checkpoint of a run of it"
        )
    return model, *(of_channels(model.pretrained_cfg[name], channels) for name in ("mean", "std"))


def of_channels(values: Sequence[float], channels: int) -> list[float]:
    """Those of red, green and blue for so many channels: of one their mean, of more they come again and again, as the
    weights do that `timm.models.adapt_input_conv` makes."""
    if len(values) in (1, channels):
        return [*values]
    return [sum(values) / len(values)] if channels == 1 else [*islice(cycle(values), channels)]


def _of_run(path: str, config: CfgNode) -> tuple[nn.Module, list[float], list[float]]:
    """Of a run's folder, the best; or of a checkpoint of one."""
    folder, channels = Path(path), config.MODEL.IN_CHANS
    if not is_url(path) and folder.is_dir():
        path = next((str(folder / name) for name in (BEST, LAST) if (folder / name).is_file()), path)
    checkpoint = open_checkpoint(path)
    if not checkpoint.config:
        raise UserError(
            f"DISTILL.TEACHER '{printable(path)}' does not say which model it is of; name a run's checkpoint, a model "
            f"of vmamba.list_models(), or timm/<name>"
        )
    its = restored(checkpoint.config, f"the config in '{checkpoint.path}'")
    if its.TASK != "classification":
        raise UserError(f"DISTILL.TEACHER '{printable(path)}' is of a run of {its.TASK}; name a classifier")
    if channels != its.MODEL.IN_CHANS:
        raise UserError(
            f"DISTILL.TEACHER '{printable(path)}' takes images of {counted(its.MODEL.IN_CHANS, 'channel')}, and "
            f"MODEL.IN_CHANS is {channels}; name a teacher of as many"
        )
    model = build_model(its)
    load_pretrained(model, checkpoint)
    warn_of_other_names(checkpoint, config)
    return model, list(its.DATA.MEAN), list(its.DATA.STD)
