"""What fine-tuning adds: losses by class, evaluation in detail, rates by layer, against scikit-learn and timm."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score
from timm.optim import param_groups_layer_decay

import vmamba
from vmamba.analysis.prediction import predict
from vmamba.classification import class_folders
from vmamba.classification.data import LabelledImages
from vmamba.classification.source import Source
from vmamba.classification.task import Accuracy, Task, balanced_weights
from vmamba.classification.transforms import without_effect
from vmamba.config import get_config, output_folder
from vmamba.data.folders import image_files as files
from vmamba.errors import UserError
from vmamba.runtime.distributed import World
from vmamba.runtime.optim import build_optimizer, layer_scales
from vmamba.runtime.trainer import run
from vmamba.segmentation.models import create_segmenter

from .tiny import log, metrics, saved, tiny_config


def test_keys_of_a_crop_that_is_not_made_are_told(tmp_path):
    """Up to 32 pixels images are padded and evaluated whole."""

    def said(*opts):
        config = get_config(None, opts)
        return [sentence for training in (True, False) for sentence in without_effect(config, training)]

    small = ("DATA.IMG_SIZE", 32)
    why = "does nothing at DATA.IMG_SIZE 32: up to 32 pixels images are"
    crop = ("AUG.SCALE", [0.5, 1.0], "AUG.RATIO", [1.0, 1.0], "TEST.CROP_PCT", 0.9)
    assert said(*small) == said(*crop) == said(*small, "TEST.CROP_PCT", 1.0) == []
    assert said(*small, *crop) == [
        f"AUG.SCALE [0.5, 1.0] {why} padded and cropped, not zoomed into",
        f"AUG.RATIO [1.0, 1.0] {why} padded and cropped, not zoomed into",
        f"TEST.CROP_PCT 0.9 {why} evaluated whole",
    ]
    assert said("TEST.CROP_PCT", 0.9, "TEST.CROP", False) == ["TEST.CROP_PCT 0.9 does nothing where TEST.CROP is false"]
    config = tiny_config(tmp_path, "AUG.SCALE", [0.5, 1.0], "TRAIN.EPOCHS", 0)
    run(config)
    assert log(config).count("WARNING AUG.SCALE [0.5, 1.0] does nothing at DATA.IMG_SIZE 16") == 1
    with pytest.raises(UserError, match="AUG.SCALE is .0.0, 0.0.; it must be above 0 and at most 1"):
        get_config(None, ["AUG.SCALE", [0, 0]])


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_by_hand(tmp_path, loss, soft):
    weights, smoothing = [0.5, 1.0, 2.0, 3.0, 1.0, 0.0], 0.1
    task = Task(tiny_config(tmp_path, "TRAIN.LOSS", loss, "TRAIN.CLASS_WEIGHTS", weights))
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 5, 2, 2, 3])
    targets = torch.rand(5, 6, dtype=torch.float64).softmax(1) if soft else labels
    wanted = targets if soft else torch.nn.functional.one_hot(labels, 6) * (1 - smoothing) + smoothing / 6
    w = torch.tensor(weights, dtype=torch.float64)
    task.class_weights = w
    if loss == "cross_entropy":
        by_hand = -(w * wanted * logits.log_softmax(1)).sum(1).mean()
    else:
        chance = logits.sigmoid()
        by_hand = -(w * (wanted * chance.log() + (1 - wanted) * (1 - chance).log())).mean()
    torch.testing.assert_close(task.criterion(logits, targets, 0.0 if soft else smoothing), by_hand)


def test_balanced_weights_and_wrong_ones(tmp_path, monkeypatch):
    listed = []
    monkeypatch.setattr(
        class_folders, "image_files", lambda folder, *rest: listed.append(folder) or files(folder, *rest)
    )
    world, task = World(0, 1, 0, torch.device("cpu")), Task(tiny_config(tmp_path, "TRAIN.CLASS_WEIGHTS", "balanced"))
    task.train_loader(world)
    assert task.class_weights.tolist() == [1.0] * 6  # each class has as many images
    assert len(listed) == 6  # each folder once
    for number in range(2):
        (tmp_path / "images" / "train" / "class3").joinpath(f"{3 + 6 * number}.png").unlink()
    task.train_loader(world)
    torch.testing.assert_close(task.class_weights, torch.tensor([28 / 30] * 3 + [28 / 18] + [28 / 30] * 2))
    assert LabelledImages(task.config, Source(range(3), place="hfds/any")).class_counts() is None
    with pytest.raises(UserError, match="DATASET 'imagenet' tells labels with images only; give a weight for each"):
        balanced_weights(task.config, None)
    with pytest.raises(UserError, match="CLASS_WEIGHTS has 2 numbers, and MODEL.NUM_CLASSES is 6; give one to each"):
        run(tiny_config(tmp_path, "TRAIN.CLASS_WEIGHTS", [1, 2]))


def test_an_evaluation_in_detail_against_scikit_learn(tmp_path):
    """Class by class, in two processes' shares."""
    config = tiny_config(tmp_path)
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(40, 6), torch.randint(0, 5, (40,))  # none of the last class
    meter = Accuracy(World(0, 1, 0, torch.device("cpu")), config)
    for part in (slice(0, 25), slice(25, 40)):
        meter.add(lambda x: x, (logits[part], targets[part]))
    results, details = meter.results(), meter.details()
    taken = logits.argmax(1)
    assert results["acc1"] == pytest.approx(100 * accuracy_score(targets, taken))
    recalls = recall_score(targets, taken, labels=range(5), average=None)
    assert details["class_accuracy"] == [*(pytest.approx(100 * r, abs=1e-3) for r in recalls), None]
    assert details["mean_class_accuracy"] == pytest.approx(100 * recalls.mean())
    assert details["macro_f1"] == pytest.approx(100 * f1_score(targets, taken, labels=range(5), average="macro"))
    assert details["class_images"] == [*torch.bincount(targets).tolist(), 0]
    chance, error = logits.softmax(1).amax(1).double(), 0.0
    for low in range(15):
        inside = (chance >= low / 15) & (chance < (low + 1) / 15)
        error += abs(((taken == targets).double() - chance)[inside].sum().item()) / 40
    assert details["expected_calibration_error"] == pytest.approx(100 * error)


@pytest.mark.parametrize("name", ["vmamba_digits", "swin_tiny_patch4_window7_224"])
def test_layer_decay_is_timms(name):
    model = timm.create_model(name) if "swin" in name else vmamba.create_model(name)
    names = {parameter: key for key, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    expected = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    found = {names[parameter]: scale for parameter, scale in layer_scales(model, 0.7).items()}
    assert found == pytest.approx(expected)


def test_layer_decay_in_a_run_and_around_a_backbone(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.LAYER_DECAY", 0.5)
    model = vmamba.create_model("vmamba_digits", depths=(1, 1), dims=8)
    optimizer = build_optimizer(config, model, 512)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates[model.classifier.head.weight] == 0.1 and rates[model.patch_embed[0].weight] == pytest.approx(0.1 / 8)
    assert len(rates) == len([*model.parameters()])
    whole = create_segmenter("upernet", "vmamba_nano", 3, channels=4, aux_channels=4)
    scales = layer_scales(whole, 0.5)
    assert whole.decode_head.conv_seg.weight not in scales  # the whole rate
    last = whole.backbone.model.layers[-1].blocks[-1]
    assert {scales[parameter] for parameter in last.parameters()} == {0.5}
    with pytest.raises(UserError, match="TRAIN.LAYER_DECAY is 0.5, and the model does not tell its layers; leave it"):
        layer_scales(torch.nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize(("opts", "words"), [
    (("TRAIN.CLASS_WEIGHTS", [0] * 6), "TRAIN.CLASS_WEIGHTS is 0 for every class"),
    (("TRAIN.LOSS", "bce", "MODEL.LABEL_SMOOTHING", 1), "LABEL_SMOOTHING is 1, which TRAIN.LOSS bce does not take"),
    (("DATA.DATASET", "digits", "DATA.VAL_FRACTION", 0.5), "VAL_FRACTION is 0.5, and DATA.DATASET 'digits' comes wi"),
    (("DATA.ZIP_MODE", True, "DATA.VAL_FRACTION", 0.5), "VAL_FRACTION is 0.5, and an archive comes with held-out"),
])  # fmt: skip
def test_what_cannot_be_is_a_sentence(tmp_path, opts, words):
    with pytest.raises(UserError, match=words):
        run(tiny_config(tmp_path, *opts))


def test_the_rate_that_is_told_is_the_highest(tmp_path):
    rates = {}
    for decay in (1.0, 0.5):
        config = tiny_config(tmp_path, "TRAIN.LAYER_DECAY", decay, "TAG", decay, "TRAIN.EPOCHS", 1)
        run(config)
        rates[decay] = metrics(config)[-1]["lr"]
    assert rates[0.5] == rates[1.0]


def test_an_evaluation_of_broken_weights_is_json(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1)
    run(config)
    path = output_folder(config) / "last.pth"
    content = torch.load(path, weights_only=True)
    content["model"]["classifier.head.bias"].fill_(float("nan"))
    torch.save({"model": content["model"]}, tmp_path / "nan.pth")
    run(tiny_config(tmp_path, "EVAL_MODE", True, "MODEL.RESUME", tmp_path / "nan.pth"))
    found = json.loads((output_folder(config) / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert found["results"]["val_loss"] is None


def test_a_linear_probe_in_a_run_and_resumed(tmp_path):
    """Everything but the head is, to the bit, what the run started from; also where it goes on."""
    start = tiny_config(tmp_path, "TAG", "start", "MODEL.OPTIONS.norm_layer", "bn", "TRAIN.EPOCHS", 1)
    run(start)
    probe = ("MODEL.OPTIONS.norm_layer", "bn", "TRAIN.FREEZE", "all_but_head", "MODEL.WEIGHTS", "model")
    probe += ("MODEL.PRETRAINED", output_folder(start) / "last.pth", "MODEL.DROP_HEAD", True)
    for epochs in (1, 2):
        run(tiny_config(tmp_path, "TRAIN.EPOCHS", epochs, *probe))
    before, after = saved(start)["model"], saved(tiny_config(tmp_path))["model"]
    head = {"classifier.head.weight", "classifier.head.bias"}
    assert {name for name, weight in after.items() if not torch.equal(weight, before[name])} == head
    assert any(name.endswith("running_mean") for name in before)


def test_images_of_13_channels_from_weights_of_rgb(tmp_path):
    """In .npy files, with every augmentation that knows no colours; what a file holds is what the model sees."""
    start = tiny_config(tmp_path, "TAG", "rgb", "TRAIN.EPOCHS", 1)
    run(start)
    random = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "bands" / f"class{number % 6}" / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, random.integers(0, 256, (13, 40, 44), np.uint8))
    bands = ("DATA.DATA_PATH", tmp_path / "bands", "DATA.VAL_FRACTION", 0.3, "MODEL.IN_CHANS", 13)
    bands += ("DATA.MEAN", 0.5, "DATA.STD", 0.25, "DATA.IMG_SIZE", 36, "AUG.VFLIP", 0.5)
    bands += ("MODEL.PRETRAINED", output_folder(start) / "last.pth", "MODEL.WEIGHTS", "model", "TRAIN.EPOCHS", 1)
    config = tiny_config(tmp_path, *bands)
    world = World(0, 1, 0, torch.device("cpu"))
    loader = Task(tiny_config(tmp_path, *bands, "TEST.CROP_PCT", 1.0, "DATA.IMG_SIZE", "[40,44]")).eval_loader(world)
    (images, labels), name = loader.finish(next(iter(loader))), loader.examples.source.source.samples[0][0]
    torch.testing.assert_close(images[0], torch.from_numpy(np.load(name)) / 255 / 0.25 - 2)
    run(config)
    assert len(labels) == 6 and saved(config)["model"]["patch_embed.0.weight"].shape[1] == 13
    told = vmamba.predict(vmamba.load_model(output_folder(config)), name)
    assert len(told[0]["top"]) == 5
    with pytest.raises(UserError, match="is of images of 13 channels, which no picture shows; use vmamba.predict"):
        predict(str(output_folder(config)), [name], output=str(tmp_path / "pictures"))


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_of_an_evaluation_by_image(tmp_path, workers):
    """By hand, image by image; an unreadable one is left out, and training leaves none."""
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TRAIN.EMA.ENABLE", False)
    run(config)
    assert not (output_folder(config) / "predictions").exists()
    (tmp_path / "images" / "val" / "class2" / "2.png").write_text("no image")
    options = ("DATA.SKIP_BAD_IMAGES", True, "DATA.NUM_WORKERS", workers, "DATA.BATCH_SIZE", 4)
    results = run(tiny_config(tmp_path, "EVAL_MODE", True, *options))
    with open(output_folder(config) / "predictions" / "predictions.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    images = [path for path in files(tmp_path / "images" / "val") if path.rpartition("/")[2] != "2.png"]
    assert [row["image"] for row in rows] == images and len(images) == 11
    model = vmamba.load_model(output_folder(config) / "last.pth")
    for row in rows:
        (told,) = vmamba.predict(model, row["image"])
        chances = {each["class"]: each["probability"] for each in told["top"]}
        label = int(row["label"])
        assert f"class{label}/" in row["image"] and int(row["prediction"]) == told["top"][0]["class"]
        assert float(row["probability"]) == pytest.approx(told["top"][0]["probability"], abs=1e-5)
        if label in chances:  # of the best five
            assert float(row["probability_of_label"]) == pytest.approx(chances[label], abs=1e-5)
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert results["acc1"] == pytest.approx(100 * right / 11)


@pytest.mark.parametrize("targets, words", [
    (["p", "q", "p"], "the first that is not is 'p'"),
    ([0, 1, 2], "the first that is not is 2"),
    ([0, 1], "there are 2"),
])  # fmt: skip
def test_targets_that_are_no_classes_are_refused(targets, words):
    """They would make every weight 0, or a class come twice as often as others."""

    class Samples:
        def __len__(self):
            return 3

    samples = Samples()
    samples.targets = targets
    source = Source(samples, place="mine")
    config = get_config("configs/vmamba_digits.yaml", ["MODEL.NUM_CLASSES", 2])
    with pytest.raises(UserError, match=f"must be numbers from 0 to 1, one for each of its 3 images, and {words}"):
        LabelledImages(config, source).class_counts()
