"""Two epochs computed by hand, and what a run compared with itself would not show."""

import math

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.utils import random_seed
from torch import nn

from vmamba.classification.data import build_eval_loader, build_train_loader
from vmamba.classification.task import Accuracy
from vmamba.data.draws import preserved_generators, seed_generators
from vmamba.models.variants import build_model
from vmamba.runtime.run import Run
from vmamba.runtime.trainer import run

from .tiny import CLASSES, log, metrics, saved, tiny_config


def smooth(labels, smoothing):
    return (1 - smoothing) * nn.functional.one_hot(labels, CLASSES) + smoothing / CLASSES


def loss_by_hand(logits, targets):
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1).mean()


class Hand:
    """Training as its formulas say, for TINY's recipe without stochastic depth."""

    def __init__(self, config):
        self.config = config
        random_seed(config.SEED)
        self.model, self.average = build_model(config), build_model(config)
        self.average.load_state_dict(self.model.state_dict())
        undecayed = [
            name.endswith((".bias", ".Ds")) or (name.endswith(".weight") and weight.ndim == 1)
            for name, weight in self.model.named_parameters()
        ]
        pairs = list(zip(self.model.parameters(), undecayed, strict=True))
        groups = [{"params": [weight for weight, spared in pairs if spared == kind]} for kind in (False, True)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        groups[1]["weight_decay"] = self.optimizer.param_groups[1]["weight_decay"] = 0.0
        self.optimizer.param_groups[0]["weight_decay"] = 0.05

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.AMP.ENABLE)

    def epoch(self, number):
        """The mean loss of its three steps."""
        loader = build_train_loader(self.config, rank=0, world_size=1)
        loader.set_epoch(number)
        self.model.train()
        losses = []
        for i, (images, labels) in enumerate(map(loader.finish, loader)):
            step = 3 * number + i
            rate = 0.1 * 10 / 512 * self.factor(step / 3)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            images, targets = self.mix(images, labels, step)
            with self.autocast():
                loss = loss_by_hand(self.model(images), targets)
            self.optimizer.zero_grad()
            loss.backward()
            squares = [weight.grad.pow(2).sum() for weight in self.model.parameters()]
            norm = torch.stack(squares).sum().sqrt()
            for weight in self.model.parameters():
                weight.grad *= min(1, 5 / norm)
            self.optimizer.step()
            # timm's warm-up of the average: 1 - (1 + n)^(-2/3), n updates before this one
            decay = min(1 - (1 + step) ** (-2 / 3), 0.9) if self.config.TRAIN.EMA.WARMUP else 0.9
            with torch.no_grad():
                for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    average.copy_(decay * average + (1 - decay) * weight)
            losses.append(loss.item())
        return sum(losses) / 3

    def factor(self, epoch):
        if epoch < 1:
            start = self.config.TRAIN.WARMUP_LR / 0.1
            return start + (1 - start) * epoch
        return 5e-5 + (1 - 5e-5) * (1 + math.cos(math.pi * (epoch - 1))) / 2

    def mix(self, images, labels, step):
        if not self.config.AUG.MIXUP:
            return images, smooth(labels, 0.1)
        mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=CLASSES)
        with preserved_generators():
            seed_generators(self.config.SEED, 2, step)
            return mixup(images, labels)


@pytest.mark.parametrize(
    "opts",
    [(), ("AUG.MIXUP", 0, "AUG.CUTMIX", 0, "TRAIN.EMA.WARMUP", False, "TRAIN.WARMUP_LR", 0.05), ("AMP.ENABLE", True)],
    ids=["mixed", "not mixed", "bfloat16"],
)
def test_two_epochs_by_hand(tmp_path, opts):
    config = tiny_config(tmp_path, "MODEL.DROP_PATH_RATE", 0, *opts)
    run(config)
    hand = Hand(config)
    close = 1e-2 if config.AMP.ENABLE else 1e-5  # bfloat16 turns the last bit of a loss into another rounding
    for number, line in enumerate(metrics(config)):
        assert line["train_loss"] == pytest.approx(hand.epoch(number), rel=close)
    loader = build_eval_loader(config, rank=0, world_size=1)
    images, labels = map(torch.cat, zip(*map(loader.finish, loader), strict=True))
    for prefix, model in (("", hand.model), ("ema_", hand.average)):
        model.eval()
        with torch.no_grad(), hand.autocast():
            expected = loss_by_hand(model(images), smooth(labels, 0))
        assert line[f"{prefix}val_loss"] == pytest.approx(expected.item(), rel=close)
    if not config.AMP.ENABLE:
        for key, model in (("model", hand.model), ("model_ema", hand.average)):
            for name, weight in model.state_dict().items():
                torch.testing.assert_close(saved(config)[key][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_training_and_evaluation_compute_in(tmp_path, dtype):
    seen = {}

    def look(module, args, output):
        if isinstance(module, nn.Linear) and output.device.type != "meta":  # where its cost is counted
            seen.setdefault(module.training, set()).add(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(look)
    name = str(dtype).removeprefix("torch.")
    half = ("AMP.ENABLE", True, "AMP.DTYPE", name) if dtype != torch.float32 else ()
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1, *half))
    handle.remove()
    assert seen == {True: {dtype}, False: {dtype}}


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_as_the_config_says(tmp_path, allowed):
    run(tiny_config(tmp_path, "TF32", allowed, "TRAIN.EPOCHS", 0))
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert torch.backends.cudnn.allow_tf32 is allowed


def test_an_evaluation_that_fails_costs_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Accuracy, "results", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tiny_config(tmp_path))
    assert saved(tiny_config(tmp_path))["step"] == 3


def test_what_is_saved_when(tmp_path, monkeypatch):
    saves, save = [], Run.save

    def noted(self, state, *names):
        saves.append((names, state.step, state.recorded))
        save(self, state, *names)

    monkeypatch.setattr(Run, "save", noted)
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 5, "SAVE_FREQ", 2, "TRAIN.SAVE_STEPS", 4))
    last = [(step, recorded) for names, step, recorded in saves if "last.pth" in names]
    assert last == [(4, 3), (6, 3), (6, 6), (8, 6), (12, 9), (12, 12), (15, 12), (15, 15)]
    saves.clear()
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 3, "EVAL_FREQ", 3, "TAG", "seldom evaluated"))
    assert [(step, recorded) for _, step, recorded in saves] == [(3, 3), (6, 6), (9, 6), (9, 9)]


def test_start_epoch_counts_epochs_as_done(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.START_EPOCH", 1)
    run(config)
    (line,) = metrics(config)
    assert (line["epoch"], line["step"]) == (2, 6)
    assert log(config).count("train [") == 3
    assert line["lr"] == pytest.approx(0.1 * 10 / 512 * (5e-5 + (1 - 5e-5) * (1 + math.cos(math.pi * 2 / 3)) / 2))


def test_the_best_of_each_kind_of_weights_is_kept(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 3)
    run(config)
    for name in ("acc1", "ema_acc1"):
        assert saved(config)["best"][name] == max(line[name] for line in metrics(config))


def test_gradient_checkpointing_recomputes_each_block_and_changes_no_number(tmp_path, monkeypatch):
    recomputed = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def noted(function, *args, **options):
        recomputed.append(function)
        return checkpoint(function, *args, **options)

    monkeypatch.setattr("vmamba.models.vssm.checkpoint", noted)
    lines = []
    for use in (False, True):
        config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TAG", use, "TRAIN.USE_CHECKPOINT", use)
        run(config)
        lines.append(metrics(config))
    assert len(recomputed) == 3 * 2  # steps, blocks
    assert lines[0] == lines[1]


def test_each_micro_batch_draws_its_own_stochastic_depth(tmp_path, monkeypatch):
    drawn = []
    bernoulli = torch.Tensor.bernoulli_

    def noted(self, *args, **options):
        drawn.append(bernoulli(self, *args, **options).flatten().tolist())
        return self

    monkeypatch.setattr(torch.Tensor, "bernoulli_", noted)
    options = ("DATA.BATCH_SIZE", 10, "TRAIN.ACCUMULATION_STEPS", 3, "MODEL.DROP_PATH_RATE", 0.5)
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1, *options))
    parts = np.array(drawn).reshape(3, -1)  # what each of the three micro-batches drew
    assert len({tuple(part) for part in parts}) == 3
