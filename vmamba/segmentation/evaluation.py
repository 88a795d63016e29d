"""What a segmenter makes of whole images, and how good that is: intersection over union by class."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.config import sides
from vmamba.errors import UserError
from vmamba.runtime.distributed import sum_over_processes
from vmamba.runtime.task import Results
from vmamba.segmentation.upernet import resize


def check_inference(config: CfgNode) -> None:
    """Raises UserError for TEST's settings that would leave pixels out."""
    test, window = config.TEST, config.DATA.CROP_SIZE
    if not test.SCALES:
        raise UserError("TEST.SCALES is []; name at least one, such as [1.0]")
    if test.MODE == "slide" and any(step > side for step, side in zip(sides(test.STRIDE), sides(window), strict=True)):
        raise UserError(
            f"TEST.STRIDE is {test.STRIDE} and DATA.CROP_SIZE {window}: windows would leave pixels out between them; "
            f"choose a smaller stride"
        )


class OfOneSize:
    """A model of images of one `size` alone, such as a recorded program, for images (1, 3, h, w) of any.

    They are fitted into it, with zeros at the right and bottom as in training, and the logits of these are cut off.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], size: tuple[int, int]):
        self.model, self.size = model, size

    def __call__(self, images: Tensor) -> Tensor:
        (height, width), given = self.size, images.shape[2:]
        if given[0] > height or given[1] > width:
            scale = min(height / given[0], width / given[1])
            images = resize(images, [max(1, round(side * scale)) for side in given])
        below, right = height - images.shape[2], width - images.shape[3]
        logits = self.model(F.pad(images, (0, right, 0, below)))
        return resize(logits[..., : height - below, : width - right], given)


class Inference:
    """Class probabilities of images of any size, as TEST says: whole or by windows, at several scales, mirrored too."""

    def __init__(self, config: CfgNode):
        self.test, self.window, self.stride = config.TEST, sides(config.DATA.CROP_SIZE), sides(config.TEST.STRIDE)

    def __call__(self, model: Callable[[Tensor], Tensor], images: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """`images`, (3, h, w) each, are one at several scales -> classes (H, W) uint8 of `size`."""
        flips = (False, True) if self.test.FLIP else (False,)
        total: Tensor | float = 0.0
        for image in images:
            for flip in flips:
                logits = self._logits(model, image.flip(-1) if flip else image)
                logits = resize(logits.flip(-1) if flip else logits, size)[0]
                # One prediction alone needs no probabilities: its largest logit is the most probable.
                total = total + (logits if len(images) * len(flips) == 1 else logits.softmax(0))
        return total.argmax(0).to(torch.uint8)

    def _logits(self, model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """(3, h, w) -> (1, classes, h, w)."""
        if self.test.MODE == "whole":
            return model(image[None]).float()
        total, count = 0.0, image.new_zeros(1, 1, *image.shape[1:], dtype=torch.float32)
        for place in windows(image.shape[1:], self.window, self.stride):
            part = torch.zeros_like(count)
            part[..., place[0], place[1]] = 1
            count += part
            logits = model(image[None, :, place[0], place[1]]).float()
            if isinstance(total, float):
                total = logits.new_zeros(1, logits.shape[1], *image.shape[1:])
            total[..., place[0], place[1]] += logits
        return total / count


def windows(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> list[tuple[slice, slice]]:
    """Windows that cover an image of `size`, a stride apart, the last ones ending with it."""
    starts = []
    for side, wide, step in zip(size, window, stride, strict=True):
        number = max(0, -(-(side - wide) // step)) + 1
        starts.append([max(0, min(index * step, side - wide)) for index in range(number)])
    return [(slice(y, y + window[0]), slice(x, x + window[1])) for y in starts[0] for x in starts[1]]


class IoU:
    """Mean intersection over union, mean accuracy of the classes and accuracy of the pixels, in percent.

    A class that neither the maps nor the predictions hold counts in none of the means, as in mmsegmentation.
    """

    def __init__(self, config: CfgNode, device: torch.device):
        self.classes, self.ignored = config.MODEL.NUM_CLASSES, config.DATA.IGNORE_INDEX
        self.place = config.DATA.DATA_PATH
        self.inference = Inference(config)
        self.confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64, device=device)  # truth x prediction
        self.keep, self.predicted = config.TEST.SAVE_PREDICTIONS, {}

    def add(self, model: nn.Module, batch: Sequence[tuple[list[Tensor], Tensor, str]]) -> None:
        self.predicted = {}
        for images, truth, name in batch:
            predicted = self.predicted[name] = self.inference(model, images, truth.shape)
            counts = truth != self.ignored
            pairs = torch.where(counts, truth.long() * self.classes + predicted, self.classes**2)
            counted = torch.bincount(pairs.flatten(), minlength=self.classes**2 + 1)[:-1]
            self.confusion += counted.view_as(self.confusion)

    def results(self) -> Results:
        self.confusion = sum_over_processes(self.confusion)
        self.predicted = {}
        confusion = self.confusion.cpu().numpy()
        if not confusion.sum():
            raise UserError(f"no pixel of the validation images counts; check DATA.DATA_PATH '{self.place}'")
        by_class = per_class(confusion)
        means = {name: float(np.nanmean(values)) for name, values in by_class.items()}
        return {"mIoU": means["IoU"], "mAcc": means["Acc"], "aAcc": 100 * float(confusion.trace() / confusion.sum())}

    def details(self) -> dict[str, Any]:
        """By class, null where there is none of it; after `results`, of all processes."""
        found = per_class(self.confusion.cpu().numpy())
        return {name: [None if np.isnan(value) else value for value in values] for name, values in found.items()}

    def files(self) -> dict[str, bytes]:
        """The maps of the batch just added, as PNG."""
        return {f"{name}.png": _png(classes) for name, classes in self.predicted.items() if self.keep}


def per_class(confusion: np.ndarray) -> dict[str, list[float]]:
    """(classes, classes), truth x prediction -> intersection over union and accuracy in percent, NaN for a class that
    is nowhere, or in no truth."""
    right, truths, predictions = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        return {"IoU": (100 * right / (truths + predictions - right)).tolist(), "Acc": (100 * right / truths).tolist()}


def _png(classes: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(classes.cpu().numpy()).save(file, "png")
    return file.getvalue()
