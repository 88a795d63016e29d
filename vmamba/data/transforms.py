"""What detection and segmentation do with an image of any size: fit it into a scale, normalise."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from yacs.config import CfgNode


def as_image(image: Image.Image) -> tv_tensors.Image:
    """(3, H, W) uint8."""
    return tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def fitted(size: Sequence[int], short: float, long: float) -> tuple[int, int]:
    """(h, w) scaled until its short side is `short`, or its long one `long` where that comes first."""
    height, width = size
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """An image, with it boxes or a mask; bilinear without a low pass, as OpenCV, with which the released models saw
    theirs; masks by the nearest pixel."""
    return F.resize(x, list(size), antialias=False)


class Normalise:
    """(3, H, W) uint8 -> float32, DATA.MEAN taken off, over DATA.STD."""

    def __init__(self, config: CfgNode):
        self.mean, self.std = config.DATA.MEAN, config.DATA.STD

    def __call__(self, image: Tensor) -> Tensor:
        return F.normalize(F.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True), self.mean, self.std)
