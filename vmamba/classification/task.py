"""Classification as a task: cross-entropy, top-1 and top-5 accuracy."""

import csv
import io
import logging
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.classification.class_maps import real_accuracy
from vmamba.classification.class_names import warn_of_other_names
from vmamba.classification.data import build_eval_loader, build_train_loader
from vmamba.classification.datasets import check_dataset
from vmamba.classification.sizes import Sizes, check_sizes
from vmamba.classification.teachers import Teacher, soft_cross_entropy
from vmamba.classification.transforms import Batch, build_mixup, build_pixels, without_effect
from vmamba.config import image_size
from vmamba.data.loaders import EvalLoader, TrainLoader
from vmamba.errors import UserError, unknown
from vmamba.extensions import LOSSES
from vmamba.models.flops import complexity
from vmamba.models.pretrained import Checkpoint, load_pretrained
from vmamba.models.variants import build_model, check_name, check_size
from vmamba.runtime.distributed import World, gather, sum_over_processes
from vmamba.runtime.plan import build_plan
from vmamba.runtime.task import Results
from vmamba.text import counted

logger = logging.getLogger("vmamba")


class Task:
    """See `vmamba.runtime.task.Task`."""

    headline = "acc1"
    panels = MappingProxyType({"top-1 (%)": "acc1"})
    average: nn.Module | None = None
    # What `train_loader` sets:
    class_weights: Tensor | None  # (classes,), as TRAIN.CLASS_WEIGHTS says, on the device
    teacher: Teacher | None
    sizes: Sizes | None
    mesa_from: int  # the step that TRAIN.MESA counts from

    def __init__(self, config: CfgNode):
        self.config = config
        self.compared: set[Path] = set()  # checkpoints, in what they call the classes

    @cached_property
    def mixup(self) -> Callable[..., Batch] | None:
        return build_mixup(self.config)

    def check(self) -> None:
        check_name(self.config)
        check_dataset(self.config)
        check_loss(self.config)
        check_sizes(self.config)
        build_pixels(self.config, training=True)
        _ = self.mixup, given_weights(self.config)

    def build_model(self) -> nn.Module:
        model, settings = build_model(self.config), self.config.MODEL
        for side in self.config.AUG.SIZES:
            check_size(settings.NAME, model, settings.IN_CHANS, (side, side))
        return model

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        load_pretrained(model, checkpoint)
        if self.config.EVAL_MODE and checkpoint.path not in self.compared:  # of a file's weights and their average once
            self.compared.add(checkpoint.path)
            warn_of_other_names(checkpoint, self.config)

    def start_from(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        load_pretrained(model, checkpoint, drop_head=self.config.MODEL.DROP_HEAD)

    def train_loader(self, world: World) -> TrainLoader:
        self._tell_what_does_nothing(world, training=True)
        loader = build_train_loader(self.config, rank=world.rank, world_size=world.size, on_machine=world.on_machine)
        weights = given_weights(self.config)
        if self.config.TRAIN.CLASS_WEIGHTS == "balanced":
            weights = balanced_weights(self.config, loader.examples.source.class_counts())
        self.class_weights = None if weights is None else weights.to(world.device)
        plan = build_plan(self.config, loader.steps_per_epoch)
        self.teacher = Teacher(self.config, world.device) if self.config.DISTILL.TEACHER else None
        self.sizes = Sizes(self.config, plan) if self.config.AUG.SIZES else None
        self.mesa_from = int(self.config.TRAIN.MESA_START * plan.steps)
        return loader

    def _tell_what_does_nothing(self, world: World, training: bool) -> None:
        for sentence in without_effect(self.config, training) if world.main else ():
            logger.warning(sentence)

    def eval_loader(self, world: World) -> EvalLoader:
        self._tell_what_does_nothing(world, training=False)
        self.held_out = build_eval_loader(
            self.config, rank=world.rank, world_size=world.size, on_machine=world.on_machine
        )
        return self.held_out

    def loss(self, model: nn.Module, batch: Batch, *, step: int, part: int) -> Tensor | dict[str, Tensor]:
        images, targets = batch
        smoothing = self.config.MODEL.LABEL_SMOOTHING
        if self.mixup:
            images, targets = self.mixup(images, targets, step=step, part=part)
            smoothing = 0.0  # the targets that it makes are smooth
        if self.sizes:
            images = self.sizes.resize(images, step)
        logits, losses = model(images).float(), {}
        share = self.config.DISTILL.WEIGHT if self.teacher else 0.0
        losses["labels"] = (1 - share) * self.criterion(logits, targets, smoothing)
        if self.teacher:
            losses["teacher"] = share * self.teacher.loss(logits, images)
        if self.config.TRAIN.MESA and step >= self.mesa_from:
            with torch.no_grad():
                told = self.average(images)
            losses["mesa"] = self.config.TRAIN.MESA * soft_cross_entropy(logits, told)
        return losses if len(losses) > 1 else losses["labels"]

    def criterion(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Of logits (B, classes) float32 and labels (B,) or soft targets (B, classes): the mean over the images."""
        if self.config.TRAIN.LOSS in LOSSES:
            losses = self._registered_loss(logits, targets, smoothing)
        elif self.config.TRAIN.LOSS == "bce":
            losses = BinaryCrossEntropy(smoothing, weight=self.class_weights, reduction="none")(logits, targets)
        else:
            losses = F.cross_entropy(
                logits, targets, self.class_weights, label_smoothing=smoothing, reduction="none"
            )  # of weighted classes too the mean counts images, so that micro-batches add up to their union
        return losses.mean()

    def _registered_loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """(B,), each image's weighed by what its targets have of the classes' weights."""
        name, classes = self.config.TRAIN.LOSS, logits.shape[1]
        soft = targets
        if targets.dim() == 1:
            soft = F.one_hot(targets, classes).float() * (1 - smoothing) + smoothing / classes
        losses = LOSSES[name](logits, soft)
        if losses.shape != logits.shape[:1]:
            shape = tuple(losses.shape)
            raise UserError(
                f"TRAIN.LOSS '{name}' gives losses {shape} of {len(logits)} images; give one for each, (B,)"
            )
        return losses if self.class_weights is None else losses * (soft @ self.class_weights)

    def meter(self, world: World) -> "Accuracy":
        return Accuracy(world, self.config, self.held_out if self.config.EVAL_MODE else None)

    def describe(self, results: Results) -> str:
        return f"held-out loss {results['val_loss']:.4f}, top-1 {results['acc1']:.2f}%, top-5 {results['acc5']:.2f}%"

    def cost(self, model: nn.Module) -> str:
        height, width = image_size(self.config)
        macs = complexity(model, (height, width)).macs
        return f"{macs / 1e9:.3g} GFLOPs (multiply-adds) at {height} x {width} pixels"

    def example(self, world: World) -> tuple[Tensor]:
        shape = (self.config.DATA.BATCH_SIZE, self.config.MODEL.IN_CHANS, *image_size(self.config))
        return (torch.randn(shape, device=world.device),)


def check_loss(config: CfgNode) -> None:
    """Raises UserError for a TRAIN.LOSS or TRAIN.MESA that cannot be."""
    loss = config.TRAIN.LOSS
    if loss not in ("cross_entropy", "bce", *LOSSES):
        raise unknown("TRAIN.LOSS", loss, ("cross_entropy", "bce", *LOSSES))
    if loss == "bce" and config.MODEL.LABEL_SMOOTHING == 1:
        raise UserError("MODEL.LABEL_SMOOTHING is 1, which TRAIN.LOSS bce does not take; choose less")
    if config.TRAIN.MESA and not config.TRAIN.EMA.ENABLE:
        raise UserError(
            f"TRAIN.MESA is {config.TRAIN.MESA:g}, and its teacher is the average of the weights; set "
            "TRAIN.EMA.ENABLE true (--model-ema)"
        )


def given_weights(config: CfgNode) -> Tensor | None:
    """(classes,) float32, as TRAIN.CLASS_WEIGHTS lists them; None where it does not.  Raises UserError for a list that
    does not fit."""
    wanted, classes = config.TRAIN.CLASS_WEIGHTS, config.MODEL.NUM_CLASSES
    if not wanted or wanted == "balanced":
        return None
    if len(wanted) != classes:
        numbers = counted(len(wanted), "number")
        raise UserError(f"TRAIN.CLASS_WEIGHTS has {numbers}, and MODEL.NUM_CLASSES is {classes}; give one to each")
    if not any(wanted):
        raise UserError("TRAIN.CLASS_WEIGHTS is 0 for every class, which leaves nothing to train; weigh some of them")
    return torch.tensor(wanted, dtype=torch.float32)


def balanced_weights(config: CfgNode, counts: list[int] | None) -> Tensor:
    """(classes,) float32, by the inverse of a class's images, 1 on average over them.  Raises UserError where the data
    set does not tell how many images each class has."""
    if counts is None:
        raise UserError(
            f"TRAIN.CLASS_WEIGHTS is balanced, and DATA.DATASET '{config.DATA.DATASET}' tells labels with images only; "
            "give a weight for each class"
        )
    images = torch.tensor(counts, dtype=torch.float32)
    return images.sum() / (len(counts) * images.clamp(min=1))


def left_out(config: CfgNode, loader: EvalLoader | None, device: torch.device) -> Tensor | None:
    """(classes,), true for those that have no image by DATA.CLASS_MAP; None where all have."""
    if loader is None or not config.DATA.CLASS_MAP:
        return None
    absent = torch.ones(config.MODEL.NUM_CLASSES, dtype=torch.bool, device=device)
    absent[[*{*loader.examples.source.labels()}]] = False
    return absent if absent.any() else None


class Accuracy:
    """Mean cross-entropy, top-1 and top-5 accuracy in percent (of fewer classes than 5: all).

    In detail the accuracy of each class, means over the classes, and the expected calibration error over 15 bins (arXiv
    1706.04599).  Where `loader` is named also each image's prediction, which class is taken for which, and of
    ImageNet's validation images the accuracy against ReaL labels (arXiv 2006.07159).
    Of a DATA.CLASS_MAP that leaves classes out, as ImageNet-A and -R do, no other than its own can be an answer.
    """

    bins = 15
    most_confused = 1000  # classes that a matrix is made of

    def __init__(self, world: World, config: CfgNode, loader: EvalLoader | None = None):
        self.loader, self.answers = loader, []  # of each batch (4, B): label, prediction, the chances of both
        self.rows: list[tuple[int, list[float]]] = []  # of all processes, by the image's index
        self.classes, self.place = config.MODEL.NUM_CLASSES, config.DATA.DATA_PATH
        zeros = partial(torch.zeros, dtype=torch.float64, device=world.device)
        self.sums = zeros(4)  # loss, top-1, top-5, images
        self.by_class = zeros(3, self.classes)  # right, of the class, taken for it
        self.by_chance = zeros(3, self.bins)  # of the first answers in each bin: right, their chances, images
        self.confusion = zeros(self.classes, self.classes) if loader and self.classes <= self.most_confused else None
        self.real: float | None = None  # top-1 against ReaL labels
        self.left_out = left_out(config, loader, world.device)

    def add(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch
        logits = model(images).float()  # (B, classes)
        if self.left_out is not None:
            logits = logits.masked_fill(self.left_out, -torch.inf)
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == targets[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        self.sums[:3] += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        self.sums[3] += len(targets)
        right = hits[:, 0].double()
        for row, index, amount in ((0, targets, right), (1, targets, None), (2, best[:, 0], None)):
            self.by_class[row].index_add_(0, index, torch.ones_like(right) if amount is None else amount)
        chance = logits.softmax(1).amax(1).double().nan_to_num()  # of a model that says NaN
        bins = (chance * self.bins).long().clamp(max=self.bins - 1)
        for row, amount in ((0, right), (1, chance), (2, torch.ones_like(right))):
            self.by_chance[row].index_add_(0, bins, amount)
        if self.confusion is not None:
            self.confusion.index_put_((targets, best[:, 0]), torch.ones_like(right), accumulate=True)
        if self.loader:
            chances = logits.double().softmax(1).gather(1, torch.stack([best[:, 0], targets], 1))
            self.answers.append(torch.stack([targets.double(), best[:, 0].double(), *chances.unbind(1)]))

    def results(self) -> Results:
        self.by_class, self.by_chance = sum_over_processes(self.by_class), sum_over_processes(self.by_chance)
        loss, top1, top5, images = sum_over_processes(self.sums).tolist()
        if self.loader:
            answers = torch.cat([torch.empty(4, 0, device=self.sums.device), *self.answers], 1)
            mine = zip(self.loader.given, answers.T.tolist(), strict=True)
            self.rows = sorted(row for rows in gather([*mine]) for row in rows)
            if self.classes == 1000:
                name = self.loader.examples.source.source.name
                self.real = real_accuracy([(name(index), int(answer)) for index, (_, answer, *_) in self.rows])
        if self.confusion is not None:
            self.confusion = sum_over_processes(self.confusion)
        if not images:
            raise UserError(f"none of the validation images could be read; check DATA.DATA_PATH '{self.place}'")
        return {"val_loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}

    def details(self) -> dict[str, Any]:
        """Of classes without an image the accuracy is None, and they do not count in the means."""
        right, there, taken = self.by_class.cpu()
        present = there > 0
        accuracy, f1 = 100 * right / there, 200 * right / (there + taken)
        hits, chances, images = self.by_chance.cpu()
        return {
            "mean_class_accuracy": accuracy[present].mean().item(),
            "macro_f1": f1[present].mean().item(),
            "expected_calibration_error": 100 * ((hits - chances).abs().sum() / images.sum()).item(),
            "class_accuracy": [round(a.item(), 4) if p else None for a, p in zip(accuracy, present, strict=True)],
            "class_images": there.long().tolist(),
            "calibration": [
                {"images": int(n), "accuracy": 100 * (h / n).item(), "confidence": 100 * (c / n).item()}
                for h, c, n in zip(hits, chances, images, strict=True)
                if n
            ],
        } | self._more()

    def _more(self) -> dict[str, Any]:
        """What an evaluation by itself tells too: rows of the confusion are labels, its columns predictions."""
        more = {} if self.real is None else {"real_acc1": self.real}
        return more if self.confusion is None else more | {"confusion": self.confusion.cpu().long().tolist()}

    def files(self) -> dict[str, bytes]:
        """predictions.csv, a line an image: its name, label, prediction, and the chances of the prediction and of the
        label."""
        if not self.rows:
            return {}
        source, text = self.loader.examples.source.source, io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["image", "label", "prediction", "probability", "probability_of_label"])
        for index, (label, prediction, *chances) in self.rows:
            table.writerow([source.name(index), int(label), int(prediction), *(f"{chance:.6f}" for chance in chances)])
        return {"predictions.csv": text.getvalue().encode()}
