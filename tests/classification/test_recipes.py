"""Recipes that are off by default, each against its formula: MESA, distillation, image sizes by step."""

import signal

import pytest
import timm
import torch
from timm.models import adapt_input_conv
from timm.optim import list_optimizers
from torch import nn
from torch.nn import functional as F

from vmamba.classification import teachers
from vmamba.classification.sizes import Sizes
from vmamba.classification.task import Task
from vmamba.classification.teachers import Teacher
from vmamba.config import get_config, output_folder
from vmamba.errors import UserError
from vmamba.models.variants import build_model
from vmamba.runtime.distributed import World
from vmamba.runtime.plan import build_plan
from vmamba.runtime.records import Records
from vmamba.runtime.step import OptimizerStep
from vmamba.runtime.stop import Stopped
from vmamba.runtime.trainer import run

from .tiny import CLASSES, differences, log, metrics, saved, tiny_config

CPU = World(0, 1, 0, torch.device("cpu"))
VIT = ("MODEL.NAME", "timm/deit_tiny_patch16_224", "MODEL.NUM_CLASSES", CLASSES, "DATA.IMG_SIZE", 32)
PLAIN = ("AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0, "MODEL.LABEL_SMOOTHING", 0.0, "MODEL.DROP_PATH_RATE", 0.0)


def opened(folder, *opts):
    """A task that could train, its model, and a batch."""
    config = tiny_config(folder, *PLAIN, *opts)
    torch.manual_seed(0)
    task = Task(config)
    loader = task.train_loader(CPU)
    return task, build_model(config), loader.finish(next(iter(loader)))


def test_mesa_by_hand(tmp_path):
    """From a quarter of the six steps on, against what the average says."""
    task, model, batch = opened(tmp_path, "TRAIN.MESA", 0.7)
    task.average = build_model(task.config).eval()
    logits, told = model(batch[0]), task.average(batch[0])
    labels = F.cross_entropy(logits, batch[1])
    torch.testing.assert_close(task.loss(model, batch, step=0, part=0), labels)
    losses = task.loss(model, batch, step=1, part=0)
    by_hand = -0.7 * (told.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert losses.keys() == {"labels", "mesa"}
    torch.testing.assert_close(losses["labels"], labels)
    torch.testing.assert_close(losses["mesa"], by_hand)
    sum(losses.values()).backward()
    assert all(weight.grad is None for weight in task.average.parameters())


ALL = ("TRAIN.MESA", 1.0, "AUG.SIZES", [8, 16], "TRAIN.EMA.SWITCH", True)
MEAN = ("TRAIN.EMA.KIND", "mean", "TRAIN.EMA.LAST_EPOCHS", 2, "TRAIN.OPTIMIZER.NAME", "muon")


@pytest.mark.parametrize("recipes", [ALL, MEAN])
def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path, monkeypatch, recipes):
    if "muon" in recipes and "muon" not in list_optimizers():
        pytest.skip(f"timm {timm.__version__} has no Muon")
    whole = tiny_config(tmp_path, "TAG", "whole", *recipes)
    run(whole)
    assert (", mean of the weights over the last 2 epochs\n" in log(whole)) == (recipes is MEAN)
    assert log(whole).count(" mesa ") == (5 if recipes is ALL else 0)  # of six steps
    config, call = tiny_config(tmp_path, "TAG", "stopped", *recipes), OptimizerStep.__call__

    def interrupted(self, state, *args, **options):
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return call(self, state, *args, **options)

    monkeypatch.setattr(Records, "draw", lambda self: None)  # which takes half a second
    monkeypatch.setattr(OptimizerStep, "__call__", interrupted)
    with pytest.raises(Stopped):
        run(config)
    monkeypatch.undo()
    run(config)
    assert not differences({**saved(config), "config": None}, {**saved(whole), "config": None})
    assert metrics(config) == metrics(whole)


@pytest.mark.parametrize(("kind", "temperature"), [("soft", 1.0), ("soft", 2.0), ("hard", 1.0)])
def test_distillation_by_hand(tmp_path, kind, temperature):
    """A teacher of another mean and deviation, from the checkpoint of its run."""
    taught = tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TAG", "teacher", "DATA.MEAN", 0.3, "DATA.STD", 0.5)
    if not (tmp_path / "tiny" / "teacher").exists():
        run(taught)
    folder = str(tmp_path / "tiny" / "teacher")
    options = ("DISTILL.KIND", kind, "DISTILL.TEMPERATURE", temperature, "DISTILL.WEIGHT", 0.3)
    task, model, (images, labels) = opened(tmp_path, "DISTILL.TEACHER", folder, *options)
    own_mean, own_std = (torch.tensor(task.config.DATA[key])[:, None, None] for key in ("MEAN", "STD"))
    teacher = build_model(taught).eval()
    teacher.load_state_dict(saved(taught, "best.pth")["model_ema"])
    if saved(taught, "best.pth")["best_weights"] == "model":
        teacher.load_state_dict(saved(taught, "best.pth")["model"])
    told = teacher((images * own_std + own_mean - 0.3) / 0.5)
    logits = model(images)
    if kind == "hard":
        second = F.cross_entropy(logits, told.argmax(1))
    else:
        p, q = (told / temperature).softmax(1), (logits / temperature).softmax(1)
        second = temperature**2 * (p * (p / q).log()).sum(1).mean()
    losses = task.loss(model, (images, labels), step=0, part=0)
    torch.testing.assert_close(losses["labels"], 0.7 * F.cross_entropy(logits, labels))
    torch.testing.assert_close(losses["teacher"], 0.3 * second)


def test_timms_models_teach_with_their_own_mean(tmp_path, monkeypatch):
    asked = []

    def create(name, **options):
        asked.append((name, options))
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6))
        model.num_classes, model.pretrained_cfg = 6, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        return model

    monkeypatch.setattr(teachers.timm, "create_model", create)
    task, model, (images, _) = opened(tmp_path, "DISTILL.TEACHER", "timm/any.weights")
    assert asked == [("any.weights", {"pretrained": True, "in_chans": 3})]
    seen = []
    task.teacher.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    task.teacher.loss(model(images), images)
    own_mean, own_std = (torch.tensor(task.config.DATA[key])[:, None, None] for key in ("MEAN", "STD"))
    torch.testing.assert_close(seen[0], (images * own_std + own_mean - 0.5) / 0.5)
    assert not any(weight.requires_grad for weight in task.teacher.model.parameters())


@pytest.mark.parametrize(("opts", "words"), [
    (("TRAIN.MESA", 1, "TRAIN.EMA.ENABLE", False), "TRAIN.MESA is 1, and its teacher is the average .*--model-ema"),
    (("DISTILL.TEACHER", "nowhere.pth"), "nowhere.pth"),
    (("DISTILL.TEACHER", "timm/nothing"), "DISTILL.TEACHER timm/nothing cannot be had with timm's weights"),
    (("DISTILL.TEACHER", "bare.pth"), "bare.pth' does not say which model it is of; name a run's checkpoint"),
    (("DISTILL.TEACHER", "seven.pth"), "seven.pth' tells 7 classes apart, and MODEL.NUM_CLASSES is 6; name a teacher"),
    (("DISTILL.TEACHER", "gray.pth"), "gray.pth' takes images of 1 channel, and MODEL.IN_CHANS is 3"),
    (("DISTILL.TEACHER", "boxes.pth"), "boxes.pth' is of a run of detection; name a classifier"),
    (("DISTILL.TEACHER", "vit.pth"), "TEACHER vit.pth does not take images of 16 x 16 pixels .*; give another size"),
    (("AUG.SIZES", [8, 32]), "AUG.SIZES has 32, and images are loaded at DATA.IMG_SIZE 16; leave larger sides out"),
    (("AUG.SIZES", [8], "DATA.IMG_SIZE", [16, 20]), "AUG.SIZES are sides of squares, and DATA.IMG_SIZE is .16, 20."),
    (("TRAIN.EMA.SWITCH", True, "TRAIN.EMA.KIND", "mean"), "SWITCH puts the exponential average .* there is none"),
    (("TRAIN.PATIENCE", 2, "TRAIN.EMA.KIND", "mean"), "KIND is mean, .* planned end, and TRAIN.PATIENCE 2 may end"),
    (("TRAIN.EMA.SWITCH", True, "TRAIN.EMA.ENABLE", False), "SWITCH puts the exponential average .* there is none"),
])  # fmt: skip
def test_what_cannot_be_is_a_sentence(tmp_path, monkeypatch, opts, words):
    config = tiny_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    weights = build_model(config).state_dict()
    torch.save({"model": weights}, "bare.pth")
    for name, *change in (("seven", "NUM_CLASSES", 7), ("gray", "IN_CHANS", 1)):
        other = tiny_config(tmp_path, f"MODEL.{change[0]}", change[1], "DATA.MEAN", 0.5, "DATA.STD", 0.5)
        torch.save({"model": build_model(other).state_dict(), "config": plain(other)}, f"{name}.pth")
    torch.save({"model": weights, "config": {"TASK": "detection"}}, "boxes.pth")
    if "vit.pth" in opts:
        vit = get_config(None, VIT)
        torch.save({"model": build_model(vit).state_dict(), "config": plain(vit)}, "vit.pth")
    config = tiny_config(tmp_path, *opts)
    with pytest.raises(UserError, match=words):
        run(config)
    if "DISTILL.TEACHER" not in opts:  # which the config alone tells
        assert not output_folder(config).exists()


def test_sizes_that_the_model_does_not_take_are_refused_at_the_start():
    with pytest.raises(
        UserError, match="deit_tiny_patch16_224 does not take images of 16 x 16 pixels .*; give another"
    ):
        Task(get_config(None, [*VIT, "AUG.SIZES", [16, 32]])).build_model()


def plain(config):
    return {key: plain(value) if isinstance(value, dict) else value for key, value in config.items()}


@pytest.mark.parametrize("spread", [0.005, 1e-200, 5e-324])
def test_a_bell_that_is_narrow_is_of_the_nearest_sides(tmp_path, spread):
    opts = ("AUG.SIZES", [8, 10, 12, 16], "TRAIN.EPOCHS", 7, "AUG.SIZE_MIX", 0.2)
    narrow, none = (tiny_config(tmp_path, *opts, "AUG.SIZE_SPREAD", each) for each in (spread, 0.0))
    plan = build_plan(none, 3)
    for epoch in (0, 2, 3, 5, 6):
        assert Sizes(narrow, plan).chances(epoch) == pytest.approx(Sizes(none, plan).chances(epoch))


@pytest.mark.parametrize(("channels", "mean"), [(1, [0.2]), (3, [0.1, 0.2, 0.3]), (4, [0.1, 0.2, 0.3, 0.1])])
def test_a_published_teacher_of_any_channels(tmp_path, monkeypatch, channels, mean):
    """What its weights of three channels, as timm adapts them, say of images is what the three say."""

    def create(name, in_chans, **_):
        model = nn.Sequential(nn.Conv2d(in_chans, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model[0].weight.data = adapt_input_conv(in_chans, torch.ones(6, 3, 1, 1))
        model.num_classes, model.pretrained_cfg = 6, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
        return model

    monkeypatch.setattr(teachers.timm, "create_model", create)
    own = ("MODEL.IN_CHANS", channels, "DATA.MEAN", 0.0, "DATA.STD", 1.0)
    teacher = Teacher(tiny_config(tmp_path, *own, "DISTILL.TEACHER", "timm/any"), torch.device("cpu"))
    torch.testing.assert_close(teacher.shift.flatten(), -torch.tensor(mean) / 0.5)
    images = torch.full((1, channels, 16, 16), 0.7)
    said = teacher.model(images * teacher.scale + teacher.shift)
    if channels in (1, 3):
        torch.testing.assert_close(said, torch.full((1, 6), (0.6 + 0.5 + 0.4) / 0.5))
    monkeypatch.setattr(teachers, "create_model", lambda name, pretrained, in_chans: create(name, in_chans))
    assert len(teachers.open_teacher(tiny_config(tmp_path, *own, "DISTILL.TEACHER", "vmamba_tiny"))[1]) == channels


def test_sizes_are_drawn_as_timm_draws_them(tmp_path):
    opts = ("AUG.SIZES", [8, 10, 12, 16], "TRAIN.EPOCHS", 7)
    for changes in ((), ("AUG.SIZE_SPREAD", 0.0), ("AUG.SIZE_SPREAD", 2.0, "AUG.SIZE_MIX", 0.5)):
        config = tiny_config(tmp_path, *opts, *changes)
        sizes = Sizes(config, build_plan(config, 3))
        assert all(sum(sizes.chances(epoch)) == pytest.approx(1) for epoch in range(7))
        assert sizes.chances(0) == pytest.approx(sizes.chances(6)[::-1])
        compare_with_timm(config, sizes)
    # by hand: the centre lies at place 1.5 of 0..3 in the middle, and two sides are as near
    config = tiny_config(tmp_path, *opts, "AUG.SIZE_SPREAD", 0.0, "AUG.SIZE_MIX", 0.2)
    assert Sizes(config, build_plan(config, 3)).chances(3) == pytest.approx([0.05, 0.45, 0.45, 0.05])
    drawn = [sizes.side(step) for step in range(2000)]
    assert {*drawn} == {8, 10, 12, 16} and drawn == [sizes.side(step) for step in range(2000)]
    share = sum(side == 16 for side in drawn[21:]) / len(drawn[21:])  # behind the end the last chances hold
    assert share == pytest.approx(sizes.chances(6)[-1], abs=0.03)
    constant = Sizes(tiny_config(tmp_path, *opts, "AUG.SIZE_SCHEDULE", "constant"), build_plan(config, 3))
    assert constant.chances(0) == [0.25] * 4


def compare_with_timm(config, sizes):
    sampler = pytest.importorskip("timm.data.scheduled_sampler", reason=f"timm {timm.__version__} has no such thing")
    theirs = sampler.ScheduledBatchSampler(
        range(100),
        [4] * 4,
        choice_schedule="progressive",
        schedule_epochs=7,
        schedule_spread=config.AUG.SIZE_SPREAD,
        schedule_random_mix=config.AUG.SIZE_MIX,
    )
    for epoch in range(7):
        assert sizes.chances(epoch) == pytest.approx(theirs.choice_weights_for_epoch(epoch).tolist())


def test_a_step_is_computed_at_its_size(tmp_path):
    task, model, batch = opened(tmp_path, "AUG.SIZES", [8, 16], "AUG.SIZE_SPREAD", 0.0, "AUG.SIZE_MIX", 0.0)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for step in (0, 3):  # the first epoch of two, the second
        task.loss(model, batch, step=step, part=0)
    assert seen[1] is batch[0]
    small = F.interpolate(batch[0], (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[0], small)


def test_a_teacher_sees_the_images_of_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "__init__", lambda self, config, device: None)
    seen = []
    monkeypatch.setattr(Teacher, "loss", lambda self, logits, images: seen.append(images) or logits.sum() * 0)
    sizes = ("AUG.SIZES", [8, 16], "AUG.SIZE_SPREAD", 0.0, "AUG.SIZE_MIX", 0.0)
    task, model, batch = opened(tmp_path, "DISTILL.TEACHER", "anybody", *sizes)
    task.loss(model, batch, step=0, part=0)
    assert seen[0].shape[-1] == 8
