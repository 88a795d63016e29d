"""Runs of detection: what they leave, stopped and resumed ones, several processes, weights to start from."""

import json
import logging
import re
import signal
import sys

import pytest
import torch
from torch import nn

import vmamba
from vmamba.config import output_folder
from vmamba.detection.task import Task
from vmamba.errors import UserError
from vmamba.models.pretrained import open_checkpoint
from vmamba.runtime.distributed import World
from vmamba.runtime.step import OptimizerStep, parallelise
from vmamba.runtime.stop import Stopped
from vmamba.runtime.trainer import run

from ..classification.tiny import differences, log, metrics, saved
from ..forked import together
from .tiny import command, tiny_config, train_loader

NO_CHANCE = (
    "MODEL.DROP_PATH_RATE",
    0,
    "MODEL.RPN_SAMPLES",
    10**6,
    "MODEL.SAMPLES",
    10**6,
)  # each process draws its own


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, results) of two epochs."""
    config = tiny_config(tmp_path_factory.mktemp("trained"))
    return config, run(config)


def test_a_run_tells_data_losses_and_both_accuracies(trained):
    config, results = trained
    text = log(config)
    for part in (
        "coco in ",
        "7 images to train on, 5 held out, 3 classes",
        "7 images, left out: crowds (1), images without an object or below DATA.LEAST_SIDE (1)",
        "loss_rpn_cls ",
        "loss_rpn_bbox ",
        "loss_cls ",
        "loss_bbox ",
        "loss_mask ",
        f"box AP {results['bbox_mAP']:.2f}%, mask AP {results['segm_mAP']:.2f}%",
    ):
        assert part in text
    assert len(results) == 4 * 12 and {"ema_segm_AR_100", "bbox_mAP_75"} <= results.keys()
    steps = [line for line in text.splitlines() if "train [" in line]
    for line in steps:
        whole, *parts = (float(number) for number in re.findall(r"loss(?:_\w+)? ([\d.]+)", line)[:6])
        assert whole == pytest.approx(sum(parts[:5]), abs=1e-3)


@pytest.mark.parametrize(("step", "workers"), [(1, 2), (3, 0)])
def test_stopped_in_the_middle_of_an_epoch_and_resumed(tmp_path, trained, monkeypatch, step, workers):
    config = tiny_config(tmp_path, "DATA.NUM_WORKERS", workers)
    whole_step = OptimizerStep.__call__

    def interrupted(self, state, *args, **options):
        if state.step == step:
            signal.raise_signal(signal.SIGTERM)
        return whole_step(self, state, *args, **options)

    monkeypatch.setattr(OptimizerStep, "__call__", interrupted)
    with pytest.raises(Stopped, match="SIGTERM"):
        run(config)
    monkeypatch.setattr(OptimizerStep, "__call__", whole_step)
    assert saved(config)["step"] == step + 2
    run(config)
    one, other = saved(config), saved(trained[0])
    assert not differences({**one, "config": None}, {**other, "config": None})
    assert metrics(config) == metrics(trained[0])


def test_two_processes_give_the_curve_of_one_and_count_every_image_once(tmp_path):
    """Also where a process has only images without an object, as after a crop."""
    opts = [*map(str, NO_CHANCE), "DATA.GROUP_BY_ASPECT", "false", "AUG.CROP", "1.0", "AUG.CROP_SHORT_SIDES", "[40]"]
    opts += ["AUG.CROP_SIDES", "[12, 12]"]
    one = tiny_config(tmp_path, *opts, "TAG", "one")
    run(one)
    together(29627, *command(tmp_path, "--opts", *opts, "TAG", "two", "DATA.BATCH_SIZE", "1")[1:])
    two = tiny_config(tmp_path, *opts, "TAG", "two")
    assert "2 processes on CPU" in log(two)
    # The mean of two processes' means is that of all boxes only where both have as many, so losses are near, not equal.
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert right["train_loss"] == pytest.approx(left["train_loss"], rel=0.1)
    results = run(tiny_config(tmp_path, *opts, "TAG", "two", "EVAL_MODE", True))
    assert results == pytest.approx({name: metrics(two)[-1][name] for name in results}, abs=1e-6)


def test_fewer_images_than_processes(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    task = Task(config)
    assert [len(list(task.eval_loader(World(rank, 6, rank, torch.device("cpu"))))) for rank in range(6)] == [1] * 5 + [
        0
    ]
    found = [{"image_id": 100, "category_id": 3, "bbox": [1.0, 1.0, 9.0, 9.0], "score": 0.5}]
    found[0]["segmentation"] = {"size": [64, 40], "counts": "`00S2"}
    gathered = iter([[found, []], [[100], []]])  # of this process, and of one that had no image
    monkeypatch.setattr("vmamba.detection.evaluation.gather", lambda value: next(gathered))
    assert task.meter(World(1, 2, 1, torch.device("cpu"))).results()["bbox_mAP"] == 0
    with pytest.raises(UserError, match="7 training images do not fill one batch of 8"):
        run(tiny_config(tmp_path, "DATA.BATCH_SIZE", 8))


def test_evaluating_and_starting_from_a_file(tmp_path, trained):
    config, results = trained
    checkpoint = output_folder(config) / "last.pth"
    assert run(tiny_config(config.OUTPUT, "EVAL_MODE", True)) == results
    options = ("MODEL.PRETRAINED", checkpoint, "MODEL.WEIGHTS", "model", "TRAIN.EPOCHS", 0)
    started = run(tiny_config(tmp_path, *options))
    assert started["bbox_mAP"] == started["ema_bbox_mAP"] == results["bbox_mAP"]


def test_a_checkpoint_names_its_classes_and_another_file_of_annotations_does_not(tmp_path, trained, caplog):
    """Nor does that tell the categories' numbers then."""
    logging.getLogger("vmamba").propagate = True
    best = output_folder(trained[0]) / "best.pth"
    model = vmamba.load_model(best)
    assert (model.class_names, model.category_numbers) == (["disc", "bar", "ring"], [3, 7, 20])
    content = torch.load(best, weights_only=True)
    content["config"]["DATA"]["DATA_PATH"] = str(tmp_path)
    torch.save(content, tmp_path / "best.pth")
    categories = [{"id": number, "name": name} for number, name in ((5, "cat"), (6, "dog"), (9, "emu"))]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": categories})
    )
    assert "categories" not in caplog.text
    model = vmamba.load_model(tmp_path / "best.pth")
    assert (model.class_names, model.category_numbers) == (["disc", "bar", "ring"], [0, 1, 2])
    assert "instances_val2017.json' is not there, or has other categories; category_id counts from 0" in caplog.text


def test_a_detector_of_other_classes_needs_a_new_head(tmp_path, trained):
    """As one of COCO's 80 classes, to go on with on another data set."""
    config, _ = trained
    checkpoint = open_checkpoint(output_folder(config) / "last.pth", "model")
    task = Task(tiny_config(tmp_path, "MODEL.NUM_CLASSES", 10))
    model = task.build_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for load in (task.start_from, task.load):
        with pytest.raises(UserError, match=r"fc_cls.weight.*\(4, 16\).*\(11, 16\)"):
            load(model, checkpoint)
    assert not differences(before, dict(model.state_dict()))
    Task(tiny_config(tmp_path, "MODEL.NUM_CLASSES", 10, "MODEL.DROP_HEAD", True)).start_from(model, checkpoint)
    made, source = model.state_dict(), checkpoint.whole
    dropped = {
        name for name in source if made[name].shape != source[name].shape or differences(made[name], source[name])
    }
    layers = ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
    assert dropped == {f"roi_head.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_a_classifiers_weights_start_a_run_and_are_no_detector(tmp_path):
    torch.manual_seed(0)
    classifier = vmamba.create_model("vmamba_nano", num_classes=7, depths=(1, 1, 1, 1), dims=8)
    path = tmp_path / "classifier.pth"
    torch.save({"model": classifier.state_dict()}, path)
    task = Task(tiny_config(tmp_path))
    model = task.build_model()
    task.start_from(model, open_checkpoint(path))
    for name, weight in classifier.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(model.state_dict()[f"backbone.model.{name}"], weight)
    with pytest.raises(UserError, match="classifier.pth' holds no weights under 'backbone', so they are of a class"):
        run(tiny_config(tmp_path, "MODEL.PRETRAINED", path, "EVAL_MODE", True))
    with pytest.raises(UserError, match="holds no detector: it has no roi_head.bbox_head.fc_cls.weight"):
        vmamba.load_detector(path)


def test_a_step_reads_training_proposals_and_anchors_of_an_images_own_padding(tmp_path, monkeypatch):
    shapes = ("DATA.GROUP_BY_ASPECT", False, "DATA.DIVISOR", 16)  # 64 x 48 and 48 x 64 in a batch of 64 x 64
    config = tiny_config(tmp_path, *NO_CHANCE, *shapes, "MODEL.PROPOSALS", [20, 5])
    task, loader = Task(config), train_loader(config)
    model = task.build_model().train()
    nn.init.normal_(model.rpn_head.rpn_cls.weight)  # or all anchors would have the same loss
    batch = next(batch for batch in loader if len(set(batch["padded_sizes"])) == 2)
    assert set(batch["padded_sizes"]) == {(64, 48), (48, 64)} and batch["images"].shape[2:] == (64, 64)
    proposed = []
    losses_of = model.roi_head.losses
    monkeypatch.setattr(
        model.roi_head, "losses", lambda maps, boxes, targets: proposed.extend(boxes) or losses_of(maps, boxes, targets)
    )
    losses = task.loss(model, batch, step=0, part=0)
    assert all(5 < len(boxes) <= 20 for boxes in proposed) and len(proposed) == 2
    scores, offsets = model.rpn_head(model.pyramid(batch["images"]))
    truths = [target["boxes"] for target in batch["targets"]]
    own, whole = (
        model.rpn_head.losses(scores, offsets, sizes, truths)["loss_rpn_cls"]
        for sizes in (batch["padded_sizes"], [(64, 64)] * 2)
    )
    torch.testing.assert_close(losses["loss_rpn_cls"], own)
    assert not torch.isclose(own, whole, rtol=1e-3)


def test_a_step_waits_for_the_device_a_few_times(tmp_path, monkeypatch):
    """Once for the labels, for the samples of each stage, for the levels of boxes and of masks; the proposals aside."""
    waits, building = [], []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        whole = getattr(torch.Tensor, name)

        def counting(self, *args, whole=whole, **named):
            place = sys._getframe(1).f_code
            if building and "vmamba/detection" in place.co_filename and place.co_name != "_suppress":
                waits.append(place.co_name)
            return whole(self, *args, **named)

        monkeypatch.setattr(torch.Tensor, name, counting)
    forward = nn.Module.__call__

    def watched(self, *args, **named):
        if isinstance(self, vmamba.detection.mask_rcnn.MaskRCNN) and self.training:
            building.append(1)
            try:
                return forward(self, *args, **named)
            finally:
                building.pop()
        return forward(self, *args, **named)

    monkeypatch.setattr(nn.Module, "__call__", watched)
    run(tiny_config(tmp_path, "TRAIN.STEPS", 1, "TRAIN.EPOCHS", 0, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.EMA.ENABLE", False))
    assert sorted(waits) == ["_check_targets", "read_regions", "read_regions", "sample", "sample"]


def test_throughput_and_half_precision(tmp_path, capsys):
    measured = run(tiny_config(tmp_path, "THROUGHPUT_MODE", True, "DATA.DATA_PATH", "nowhere"))
    assert measured["images_per_second"] > 0
    config = tiny_config(tmp_path, "AMP.ENABLE", True, "TRAIN.EPOCHS", 1, "TRAIN.EMA.ENABLE", False)
    run(config)
    assert "bfloat16 autocast" in log(config) and metrics(config)[0]["bad_steps"] == 0


def test_an_unknown_detector_names_those_there_are(tmp_path):
    with pytest.raises(UserError, match="MODEL.DETECTOR 'mask_rnn'; did you mean 'mask_rcnn'"):
        tiny_config(tmp_path, "MODEL.DETECTOR", "mask_rnn")
    with pytest.raises(UserError, match="detector 'mask_rnn'; did you mean 'mask_rcnn'"):
        vmamba.create_detector("mask_rnn")
    with pytest.raises(UserError, match="option of MaskRCNN 'hiden'; did you mean 'hidden'"):
        vmamba.create_detector("mask_rcnn", "vmamba_nano", hiden=3)


def test_compilation_is_of_the_backbone_and_not_as_graphs(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    config = tiny_config(tmp_path, "TRAIN.COMPILE", "default")
    model = Task(config).build_model()
    parallelise(model, config, World(0, 1, 0, torch.device("cpu")))
    assert compiled == [(model.backbone, {"options": {"layout_optimization": False}})]
    with pytest.raises(UserError, match="cudagraphs, which would make a CUDA graph for each .* TRAIN.COMPILE default"):
        run(tiny_config(tmp_path, "TRAIN.COMPILE", "cudagraphs"))


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (
            ("AUG.CROP", 0.5, "AUG.CROP_SHORT_SIDES", "[]"),
            r"AUG.CROP is 0.5 and AUG.CROP_SHORT_SIDES is \[\]; name the",
        ),
        (("AUG.CROP_SIDES", "[60, 30]"), r"AUG.CROP_SIDES is \[60, 30\]; expected the smaller first"),
        (("DATA.SCALE", "[96, 64]"), r"DATA.SCALE is \[96, 64\]; expected the smaller first"),
    ],
)
def test_settings_that_cannot_be_are_told_at_the_start(tmp_path, opts, sentence):
    with pytest.raises(UserError, match=sentence):
        Task(tiny_config(tmp_path, *opts))
