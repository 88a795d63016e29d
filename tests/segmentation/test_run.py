"""One run after another: what training leaves, what evaluation counts and keeps, resuming, what is refused."""

import json
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vmamba
from vmamba.config import output_folder
from vmamba.errors import UserError
from vmamba.runtime.distributed import World
from vmamba.runtime.step import OptimizerStep, synchronised
from vmamba.runtime.stop import Stopped
from vmamba.runtime.trainer import run
from vmamba.segmentation.datasets import open_dataset
from vmamba.segmentation.evaluation import per_class
from vmamba.segmentation.models import build_model, create_segmenter, load_segmenter
from vmamba.segmentation.task import Task

from .tiny import CLASSES, HELD_OUT, differences, log, metrics, saved, tiny_config

VARIED = ("MODEL.INIT_STD", 1.0)  # predictions of several classes, untrained as the model is


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, results) of two epochs."""
    config = tiny_config(tmp_path_factory.mktemp("trained"), *VARIED)
    return config, run(config)


def again(config, *opts):
    return tiny_config(config.OUTPUT, *VARIED, *opts)


def test_a_run_leaves_its_folder_and_its_log(trained):
    config, results = trained
    names = {path.name for path in output_folder(config).iterdir()}
    assert {"config.yaml", "log.txt", "metrics.jsonl", "last.pth", "best.pth", "curves.png"} <= names
    assert {name: metrics(config)[-1][name] for name in results} == results
    assert f"mIoU {results['mIoU']:.2f}%, mean accuracy {results['mAcc']:.2f}%, pixels {results['aAcc']:.2f}%" in log(
        config
    )
    assert "12 images to train on, 6 held out, 5 classes" in log(config)
    assert "GFLOPs (multiply-adds) at 32 x 64 pixels" in log(config)
    best = max(line["mIoU"] for line in metrics(config))
    assert saved(config, "best.pth")["best"] == {"mIoU": best}


def test_saved_predictions_are_what_was_counted(trained):
    config, results = trained
    evaluation = again(config, "EVAL_MODE", True, "TEST.SAVE_PREDICTIONS", True, "DATA.BATCH_SIZE", 5)
    assert run(evaluation) == results
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    folder = output_folder(config) / "predictions"
    assert len([*folder.rglob("*.png")]) == HELD_OUT
    dataset = open_dataset(config, training=False)
    for index in range(HELD_OUT):
        sample = dataset.load(index)
        predicted = np.array(Image.open(folder / f"{sample.name}.png"))
        counts = sample.classes != 255
        np.add.at(confusion, (sample.classes[counts], predicted[counts]), 1)
    assert (confusion.sum(0) > 0).sum() > 1
    told = json.loads((output_folder(config) / "evaluation.json").read_text())
    assert told["results"] == results and told["checkpoint"].endswith("last.pth")
    for name, values in per_class(confusion).items():
        assert told["details"][name] == [None if np.isnan(value) else pytest.approx(value) for value in values]
        assert results[f"m{name}"] == pytest.approx(np.nanmean(values))


def test_nothing_is_kept_unless_asked(trained, tmp_path):
    config, results = trained
    checkpoint = output_folder(config) / "last.pth"
    assert run(tiny_config(tmp_path, *VARIED, "EVAL_MODE", True, "MODEL.RESUME", checkpoint)) == results
    assert not (output_folder(tiny_config(tmp_path)) / "predictions").exists()


def test_load_segmenter_of_a_run_predicts_as_the_run(trained):
    config, _ = trained
    model = load_segmenter(output_folder(config) / "last.pth")
    ours = build_model(config).eval()
    ours.load_state_dict(saved(config)["model"])
    image = torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        assert not model.training and torch.equal(model(image), ours(image))


@pytest.mark.parametrize("step", [1, 2, 4])
def test_stopped_in_an_epoch_and_resumed_bit_for_bit(tmp_path, trained, monkeypatch, step):
    config = tiny_config(tmp_path, *VARIED, "DATA.NUM_WORKERS", 2 if step == 4 else 0)
    whole_step = OptimizerStep.__call__

    def interrupted(self, state, *args, **options):
        if state.step == step:
            signal.raise_signal(signal.SIGTERM)
        return whole_step(self, state, *args, **options)

    monkeypatch.setattr(OptimizerStep, "__call__", interrupted)
    with pytest.raises(Stopped):
        run(config)
    monkeypatch.undo()
    run(config)
    one, other = saved(config), saved(trained[0])
    assert not differences({**one, "config": None}, {**other, "config": None})
    assert metrics(config) == metrics(trained[0])


def test_a_batch_in_which_nothing_counts_trains_on(tmp_path):
    tiny_config(tmp_path)
    for path in (tmp_path / "images/annotations/training").rglob("*.png"):
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1))
    assert metrics(tiny_config(tmp_path))[0]["train_loss"] == 0


def test_averaged_weights_and_half_precision(tmp_path):
    options = ("TRAIN.EMA.ENABLE", True, "AMP.ENABLE", True, "TRAIN.EPOCHS", 1)
    results = run(tiny_config(tmp_path, *options))
    assert {"mIoU", "ema_mIoU"} <= results.keys()
    assert "bfloat16 autocast" in log(tiny_config(tmp_path))


def test_several_scales_and_windows_in_a_run(trained):
    config, results = trained
    options = ("TEST.SCALES", [0.75, 1.0], "TEST.FLIP", True, "TEST.MODE", "slide", "TEST.STRIDE", 20)
    assert run(again(config, "EVAL_MODE", True, *options)).keys() == results.keys()


def test_throughput_needs_no_data(tmp_path):
    options = ("THROUGHPUT_MODE", True, "DATA.DATA_PATH", "nowhere", "DATA.BATCH_SIZE", 2)
    assert run(tiny_config(tmp_path, *options))["images_per_second"] > 0


def test_batch_norms_are_over_all_processes_of_gpus(tmp_path):
    for wanted, size, device, kind in (
        (True, 2, "cuda", nn.SyncBatchNorm),
        (False, 2, "cuda", nn.BatchNorm2d),
        (True, 1, "cuda", nn.BatchNorm2d),
        (True, 2, "cpu", nn.BatchNorm2d),  # which SyncBatchNorm refuses
    ):
        config = tiny_config(tmp_path, "MODEL.SYNC_BN", wanted)
        model = synchronised(Task(config).build_model(), config, World(0, size, 0, torch.device(device)))
        assert type(model.decode_head.bottleneck.bn) is kind


# Files of weights: a classifier's, another segmenter's, and what does not fit.


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained):
    """Files that others may have written, by name."""
    config, _ = trained
    folder = tmp_path_factory.mktemp("files")
    backbone = dict(depths=(1, 1, 1, 1), dims=4)
    contents = {
        "classifier": {"model": vmamba.create_model("vmamba_nano", **backbone).state_dict()},
        "segmenter": {"state_dict": _as_released(build_model(config).state_dict()), "optimizer": {}},
    }
    other = create_segmenter("upernet", "vmamba_nano", 7, backbone_options=backbone, channels=8, aux_channels=4)
    contents["seven"] = {"state_dict": _as_released(other.state_dict())}
    wide = create_segmenter("upernet", "vmamba_nano", CLASSES, backbone_options=backbone, channels=16, aux_channels=4)
    contents["wide"] = {"state_dict": _as_released(wide.state_dict())}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    return folder


def _as_released(weights):
    return {name.replace("backbone.model.", "backbone."): weight for name, weight in weights.items()}


def test_a_classifiers_weights_start_the_backbone_and_are_no_segmenter(tmp_path, files):
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 0, "MODEL.PRETRAINED", files / "classifier.pth"))
    assert "starting from the weights in" in log(tiny_config(tmp_path))
    with pytest.raises(
        UserError,
        match=r"classifier\.pth' holds no weights under 'backbone', .*nothing to evaluate",
    ):
        run(tiny_config(tmp_path, "EVAL_MODE", True, "MODEL.PRETRAINED", files / "classifier.pth"))
    with pytest.raises(UserError, match=r"classifier\.pth' holds no segmenter: it has no decode_head.conv_seg.weight"):
        load_segmenter(files / "classifier.pth")


def test_a_segmenter_of_other_classes_starts_without_its_class_layers(tmp_path, files):
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 0, "MODEL.PRETRAINED", files / "segmenter.pth"))
    with pytest.raises(UserError, match=r"seven\.pth' is of another architecture: .*conv_seg.*file \(7, .*--drop-head"):
        run(tiny_config(tmp_path, "TAG", "b", "TRAIN.EPOCHS", 0, "MODEL.PRETRAINED", files / "seven.pth"))
    options = ("TAG", "c", "TRAIN.EPOCHS", 0, "MODEL.PRETRAINED", files / "seven.pth", "MODEL.DROP_HEAD", True)
    run(tiny_config(tmp_path, *options))
    assert "dropped the layers of its classes" in log(tiny_config(tmp_path, *options))
    with pytest.raises(UserError, match=r"wide\.pth' is of another architecture: .*bottleneck"):
        wide = ("TAG", "d", "MODEL.PRETRAINED", files / "wide.pth", "MODEL.DROP_HEAD", True)
        run(tiny_config(tmp_path, *wide))


def test_evaluating_a_segmenter_of_other_classes_is_refused(tmp_path, files):
    with pytest.raises(UserError, match=r"seven\.pth' is of another architecture: .*conv_seg"):
        run(tiny_config(tmp_path, "EVAL_MODE", True, "MODEL.PRETRAINED", files / "seven.pth"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("MODEL.NUM_CLASSES", 3), r"holds label [34]; MODEL.NUM_CLASSES is 3, and 255 ignored"),
        (("DATA.DATA_PATH", "nowhere"), "data path 'nowhere' does not exist"),
        (("TEST.MODE", "slide", "TEST.STRIDE", 33), "TEST.STRIDE is 33 and DATA.CROP_SIZE 32: windows would leave"),
        (("TEST.SCALES", []), r"TEST.SCALES is \[\]; name at least one"),
        (("MODEL.IN_CHANS", 1), "MODEL.IN_CHANS is 1; it must be between 3 and 3"),
        (("MODEL.NAME", "timm/resnet18"), "MODEL.OPTIONS are of our models, and MODEL.NAME is timm/resnet18"),
        (("DATA.SCALE", [96, 64]), r"DATA.SCALE is \[96, 64\]; expected the smaller first"),
        (("AUG.RESIZE_RATIO", [2.0, 0.5]), r"AUG.RESIZE_RATIO is \[2.0, 0.5\]; expected the smaller first"),
        (("DATA.DIGIT_SIZES", [0.5, 0.2]), r"DATA.DIGIT_SIZES is \[0.5, 0.2\]; expected the smaller first"),
        (("DATA.IGNORE_INDEX", 0, "DATA.ZERO_IS_IGNORED", True), "IGNORE_INDEX is 0, .* those of class 1 .* at 255"),
        (("DATA.IGNORE_INDEX", 3, "DATA.DATASET", "ade20k"), "IGNORE_INDEX is 3, and labels count from 1"),
    ],
)
def test_what_cannot_run_is_one_sentence(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tiny_config(tmp_path, *options))


def test_one_image_a_process_is_refused_before_training_unless_batch_norms_are_of_several_gpus(tmp_path):
    with pytest.raises(UserError, match="DATA.BATCH_SIZE is 1, and of one .*; use --batch-size 2 or more"):
        run(tiny_config(tmp_path, "DATA.BATCH_SIZE", 1))
    assert not (output_folder(tiny_config(tmp_path)) / "last.pth").exists()
    for device, size, opts, refused in (
        ("cpu", 2, (), True),
        ("cuda", 2, (), False),
        ("cuda", 1, (), True),
        ("cuda", 2, ("MODEL.SYNC_BN", False), True),
    ):
        task = Task(tiny_config(tmp_path, "DATA.BATCH_SIZE", 1, *opts))
        with pytest.raises(UserError, match="BATCH_SIZE") if refused else nullcontext():
            task.train_loader(World(0, size, 0, torch.device(device)))
    assert run(tiny_config(tmp_path, "DATA.BATCH_SIZE", 1, "THROUGHPUT_MODE", True))["images_per_second"] > 0
