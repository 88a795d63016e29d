"""Classification as a task: cross-entropy, top-1 and top-5 accuracy."""

from collections.abc import Callable
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.classification.data import build_eval_loader, build_train_loader
from vmamba.classification.transforms import Batch, build_mixup
from vmamba.config import image_size
from vmamba.data.loaders import EvalLoader, TrainLoader
from vmamba.errors import UserError
from vmamba.models.flops import complexity
from vmamba.models.pretrained import Checkpoint, load_pretrained
from vmamba.models.variants import build_model
from vmamba.runtime.distributed import World, sum_over_processes
from vmamba.runtime.task import Results


class Task:
    """See `vmamba.runtime.task.Task`."""

    headline = "acc1"
    panels = MappingProxyType({"top-1 (%)": "acc1"})

    def __init__(self, config: CfgNode):
        self.config = config

    @cached_property
    def mixup(self) -> Callable[..., Batch] | None:
        return build_mixup(self.config)

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        load_pretrained(model, checkpoint)

    def start_from(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        load_pretrained(model, checkpoint, drop_head=self.config.MODEL.DROP_HEAD)

    def train_loader(self, world: World) -> TrainLoader:
        _ = self.mixup  # refuses what it cannot mix before anything is opened
        return build_train_loader(self.config, rank=world.rank, world_size=world.size, on_machine=world.on_machine)

    def eval_loader(self, world: World) -> EvalLoader:
        return build_eval_loader(self.config, rank=world.rank, world_size=world.size, on_machine=world.on_machine)

    def loss(self, model: nn.Module, batch: Batch, *, step: int, part: int) -> Tensor:
        images, targets = batch
        smoothing = self.config.MODEL.LABEL_SMOOTHING
        if self.mixup:
            images, targets = self.mixup(images, targets, step=step, part=part)
            smoothing = 0.0  # the targets that it makes are smooth
        return F.cross_entropy(model(images).float(), targets, label_smoothing=smoothing)

    def meter(self, world: World) -> "Accuracy":
        return Accuracy(world, self.config.DATA.DATA_PATH)

    def describe(self, results: Results) -> str:
        return f"held-out loss {results['val_loss']:.4f}, top-1 {results['acc1']:.2f}%, top-5 {results['acc5']:.2f}%"

    def cost(self, model: nn.Module) -> str:
        height, width = image_size(self.config)
        macs = complexity(model, (height, width)).macs
        return f"{macs / 1e9:.3g} GFLOPs (multiply-adds) at {height} x {width} pixels"

    def example(self, world: World) -> tuple[Tensor]:
        shape = (self.config.DATA.BATCH_SIZE, self.config.MODEL.IN_CHANS, *image_size(self.config))
        return (torch.randn(shape, device=world.device),)


class Accuracy:
    """Mean cross-entropy, top-1 and top-5 accuracy in percent (of fewer classes than 5: all)."""

    def __init__(self, world: World, place: str):
        self.sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, images
        self.place = place

    def add(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch
        logits = model(images).float()  # (B, classes)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        self.sums[:3] += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        self.sums[3] += len(targets)

    def results(self) -> Results:
        loss, top1, top5, images = sum_over_processes(self.sums).tolist()
        if not images:
            raise UserError(f"none of the validation images could be read; check DATA.DATA_PATH '{self.place}'")
        return {"val_loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}

    def details(self) -> dict[str, Any]:
        return {}

    def files(self) -> dict[str, bytes]:
        return {}
