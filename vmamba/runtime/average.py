"""The average of the weights that a run keeps beside them (TRAIN.EMA)."""

import torch
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

from vmamba.errors import UserError
from vmamba.runtime.plan import Plan


class Mean(ModelEmaV3):
    """The mean of the weights at the ends of the last epochs: stochastic weight averaging (arXiv 1803.05407).

    Before them it is the weights at the end of the last epoch.  Norms' statistics are averaged as the weights are.
    """

    def __init__(self, model: nn.Module, plan: Plan, epochs: int):
        super().__init__(model)
        self.plan, self.epochs = plan, min(epochs, plan.epochs)

    def get_decay(self, step: int) -> float:
        """What the average keeps of itself behind `step` completed ones; 1 between the ends of epochs, which are
        counted from the run's end."""
        left, rest = divmod(self.plan.steps - step, self.plan.steps_per_epoch)
        if rest:
            return 1.0
        averaged = max(self.epochs - 1 - left, 0)
        return averaged / (averaged + 1)

    def update(self, model: nn.Module, step: int) -> None:
        if self.get_decay(step) < 1:
            super().update(model, step)


def check_average(config: CfgNode) -> None:
    """Raises UserError for settings of TRAIN.EMA of which one takes no part."""
    ema = config.TRAIN.EMA
    if ema.SWITCH and not (ema.ENABLE and ema.KIND == "exponential"):
        raise UserError(
            "TRAIN.EMA.SWITCH puts the exponential average in the place of the weights, and there is none; set "
            "TRAIN.EMA.ENABLE true and TRAIN.EMA.KIND exponential"
        )
    if ema.ENABLE and ema.KIND == "mean" and config.TRAIN.PATIENCE:
        raise UserError(
            f"TRAIN.EMA.KIND is mean, of the epochs before the planned end, and TRAIN.PATIENCE "
            f"{config.TRAIN.PATIENCE} may end the run earlier; set TRAIN.PATIENCE 0, or TRAIN.EMA.KIND exponential"
        )


def build_average(config: CfgNode, model: nn.Module, plan: Plan) -> ModelEmaV3 | None:
    """None where TRAIN.EMA is off."""
    ema = config.TRAIN.EMA
    if not ema.ENABLE:
        return None
    if ema.KIND == "mean":
        return Mean(model, plan, ema.LAST_EPOCHS)
    return ModelEmaV3(model, decay=ema.DECAY, use_warmup=ema.WARMUP)


@torch.no_grad()
def take_over(average: ModelEmaV3, model: nn.Module) -> None:
    """Put the averaged weights in the place of the model's own."""
    for weight, averaged in zip(model.state_dict().values(), average.module.state_dict().values(), strict=True):
        weight.copy_(averaged)
