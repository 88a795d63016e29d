"""Steps of training at several image sizes, small ones first, as timm's data.scheduled_sampler draws them."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.data.draws import SIZE, generator
from vmamba.errors import UserError
from vmamba.runtime.plan import Plan


def check_sizes(config: CfgNode) -> None:
    """Raises UserError for sides of AUG.SIZES that DATA.IMG_SIZE does not bear."""
    sides, whole = config.AUG.SIZES, config.DATA.IMG_SIZE
    if sides and not isinstance(whole, int):
        raise UserError(f"AUG.SIZES are sides of squares, and DATA.IMG_SIZE is {whole}; give one side there too")
    if sides and max(sides) > whole:
        raise UserError(
            f"AUG.SIZES has {max(sides)}, and images are loaded at DATA.IMG_SIZE {whole}; leave larger sides out, "
            "or raise DATA.IMG_SIZE"
        )


class Sizes:
    """Draws a side of AUG.SIZES for each step, the same on all processes: a function of (SEED, step).

    Images are loaded at DATA.IMG_SIZE and made smaller where the model computes.
    """

    def __init__(self, config: CfgNode, plan: Plan):
        self.aug, self.seed, self.plan = config.AUG, config.SEED, plan

    def resize(self, images: Tensor, step: int) -> Tensor:
        """(B, C, H, W) -> the same at the side of this step."""
        side = self.side(step)
        if side == images.shape[-1]:
            return images
        return F.interpolate(images, (side, side), mode="bicubic", antialias=True)

    def side(self, step: int) -> int:
        chances = self.chances(step // self.plan.steps_per_epoch)
        drawn = torch.multinomial(torch.tensor(chances), 1, generator=generator(self.seed, SIZE, step))
        return self.aug.SIZES[drawn.item()]

    def chances(self, epoch: int) -> list[float]:
        """Of each side in an epoch, counted from 0.

        "progressive": a bell of deviation SIZE_SPREAD (in places of the list) whose centre goes from the first side to
        the last, mixed with SIZE_MIX of even chances; "constant": even ones.
        """
        number = len(self.aug.SIZES)
        if self.aug.SIZE_SCHEDULE == "constant" or number == 1:
            return [1 / number] * number
        centre = (number - 1) * (min(epoch / (self.plan.epochs - 1), 1.0) if self.plan.epochs > 1 else 1.0)
        away = [abs(place - centre) for place in range(number)]
        if self.aug.SIZE_SPREAD:
            spread, least = self.aug.SIZE_SPREAD, min(away) ** 2  # which has 1, so that narrow bells are not 0 anywhere
            bell = [math.exp((least - distance**2) / 2 / spread / spread) for distance in away]
        else:
            bell = [float(distance == min(away)) for distance in away]
        mix = self.aug.SIZE_MIX
        return [(1 - mix) * height / sum(bell) + mix / number for height in bell]
