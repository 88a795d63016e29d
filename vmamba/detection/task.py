"""Detection as a task: the losses of Mask R-CNN, COCO's average precision."""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.data.loaders import EvalLoader, TrainLoader
from vmamba.detection.data import build_eval_loader, build_train_loader
from vmamba.detection.datasets import Dataset, open_dataset
from vmamba.detection.evaluation import Detections
from vmamba.detection.models import build_model
from vmamba.errors import UserError
from vmamba.models.compilation import WITH_CUDA_GRAPHS
from vmamba.models.flops import complexity
from vmamba.models.pretrained import Checkpoint
from vmamba.models.variants import check_name
from vmamba.models.whole import load_whole, start_whole
from vmamba.runtime.distributed import World
from vmamba.runtime.task import Results


class Task:
    """See `vmamba.runtime.task.Task`."""

    headline = "bbox_mAP"
    panels = MappingProxyType({"box AP (%)": "bbox_mAP", "mask AP (%)": "segm_mAP"})

    def __init__(self, config: CfgNode):
        self.config = config
        if config.TRAIN.COMPILE in WITH_CUDA_GRAPHS:
            raise UserError(
                f"TRAIN.COMPILE is {config.TRAIN.COMPILE}, which would make a CUDA graph for each of the many sizes of "
                f"images that detection sees; use TRAIN.COMPILE default, which compiles the backbone for any size"
            )

        if config.AUG.CROP and not config.AUG.CROP_SHORT_SIDES:
            raise UserError(
                f"AUG.CROP is {config.AUG.CROP} and AUG.CROP_SHORT_SIDES is []; name the short sides that images are "
                f"scaled to before they are cropped, such as [400, 500, 600]"
            )

    @cached_property
    def held_out(self) -> Dataset:
        return open_dataset(self.config, training=False)

    def check(self) -> None:
        check_name(self.config, bare=True)

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        load_whole(model, checkpoint.whole, checkpoint.path)

    def start_from(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        start_whole(model, checkpoint, drop_head=self.config.MODEL.DROP_HEAD)

    def train_loader(self, world: World) -> TrainLoader:
        return build_train_loader(self.config, self.held_out, rank=world.rank, world_size=world.size)

    def eval_loader(self, world: World) -> EvalLoader:
        return build_eval_loader(self.config, self.held_out, rank=world.rank, world_size=world.size)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], *, step: int, part: int) -> dict[str, Tensor]:
        losses = model(batch["images"], batch["image_sizes"], batch["targets"], batch["padded_sizes"])
        return {name: value for name, value in losses.items() if "loss" in name}

    def meter(self, world: World) -> Detections:
        return Detections(self.held_out, self.config.TEST.SAVE_PREDICTIONS)

    def describe(self, results: Results) -> str:
        return f"box AP {results['bbox_mAP']:.2f}%, mask AP {results['segm_mAP']:.2f}%"

    def cost(self, model: nn.Module) -> str:
        short, long = self.config.DATA.SCALE
        size = tuple(-(-side // 32) * 32 for side in (short, min(long, 1280)))
        macs = complexity(model, size).macs
        return f"{macs / 1e9:.3g} GFLOPs (multiply-adds) at {size[0]} x {size[1]} pixels"

    def example(self, world: World) -> tuple[Any, ...]:
        divisor = self.config.DATA.DIVISOR
        sides = [-(-side // divisor) * divisor for side in self.config.DATA.SCALE]
        shape = (self.config.DATA.BATCH_SIZE, self.config.MODEL.IN_CHANS, *sides)
        return (torch.randn(shape, device=world.device),)
