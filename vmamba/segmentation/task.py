"""Segmentation as a task: the heads' losses, intersection over union."""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.config import sides
from vmamba.data.loaders import EvalLoader, TrainLoader
from vmamba.errors import UserError
from vmamba.models.flops import complexity
from vmamba.models.pretrained import Checkpoint
from vmamba.models.variants import check_name
from vmamba.models.whole import load_whole, start_whole
from vmamba.runtime.distributed import World
from vmamba.runtime.task import Results
from vmamba.segmentation.data import build_eval_loader, build_train_loader
from vmamba.segmentation.evaluation import IoU, check_inference
from vmamba.segmentation.models import build_model


class Task:
    """See `vmamba.runtime.task.Task`."""

    headline = "mIoU"
    panels = MappingProxyType({"mIoU (%)": "mIoU"})

    def __init__(self, config: CfgNode):
        self.config = config
        check_inference(config)
        data = config.DATA
        if (data.ZERO_IS_IGNORED or data.DATASET == "ade20k") and data.IGNORE_INDEX < config.MODEL.NUM_CLASSES:
            raise UserError(
                f"DATA.IGNORE_INDEX is {data.IGNORE_INDEX}, and labels count from 1, so that those of class "
                f"{data.IGNORE_INDEX + 1} in the maps would not count either; leave DATA.IGNORE_INDEX at 255"
            )

    def check(self) -> None:
        check_name(self.config, bare=True)

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        load_whole(model, checkpoint.whole, checkpoint.path)

    def start_from(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        start_whole(model, checkpoint, drop_head=self.config.MODEL.DROP_HEAD)

    def train_loader(self, world: World) -> TrainLoader:
        together = self.config.MODEL.SYNC_BN and world.device.type == "cuda" and world.size > 1
        if self.config.DATA.BATCH_SIZE == 1 and not together:
            raise UserError(
                "DATA.BATCH_SIZE is 1, and of one image the coarsest pooled map is one pixel, too little for its batch "
                "norm; use --batch-size 2 or more (TRAIN.ACCUMULATION_STEPS does not help), or several GPUs with "
                "MODEL.SYNC_BN true"
            )
        return build_train_loader(self.config, rank=world.rank, world_size=world.size)

    def eval_loader(self, world: World) -> EvalLoader:
        return build_eval_loader(self.config, rank=world.rank, world_size=world.size)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], *, step: int, part: int) -> dict[str, Tensor]:
        losses = model(*batch)
        return {name: value for name, value in losses.items() if "loss" in name}

    def meter(self, world: World) -> IoU:
        return IoU(self.config, world.device)

    def describe(self, results: Results) -> str:
        return f"mIoU {results['mIoU']:.2f}%, mean accuracy {results['mAcc']:.2f}%, pixels {results['aAcc']:.2f}%"

    def cost(self, model: nn.Module) -> str:
        size = tuple(self.config.DATA.SCALE)
        return f"{complexity(model, size).macs / 1e9:.3g} GFLOPs (multiply-adds) at {size[0]} x {size[1]} pixels"

    def example(self, world: World) -> tuple[Any, ...]:
        shape = (self.config.DATA.BATCH_SIZE, self.config.MODEL.IN_CHANS, *sides(self.config.DATA.CROP_SIZE))
        return (torch.randn(shape, device=world.device),)
