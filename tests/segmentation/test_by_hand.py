"""Steps and results computed by hand, and by scikit-learn: losses, what is logged, the means over classes, windows."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from timm.utils import random_seed
from torch.nn import functional as F

from vmamba.errors import UserError
from vmamba.models.weights import without_wrappers
from vmamba.runtime.optim import parameter_groups
from vmamba.runtime.trainer import run
from vmamba.segmentation.data import build_train_loader
from vmamba.segmentation.evaluation import Inference, IoU, windows
from vmamba.segmentation.models import build_model, create_segmenter
from vmamba.segmentation.upernet import Pool, resize

from .tiny import CLASSES, log, metrics, saved, tiny_config

IGNORED = 255
CPU = torch.device("cpu")


def loss_by_hand(logits, targets):
    """Mean over all pixels of the cross-entropy of those that count."""
    counts = targets != IGNORED
    probabilities = logits.softmax(1).gather(1, targets.where(counts, 0)[:, None])[:, 0]
    return -(probabilities.log() * counts).sum() / targets.numel()


@pytest.mark.parametrize("weight", [0.4, 1.5])
def test_two_epochs_by_hand(tmp_path, weight):
    calm = ("MODEL.DROP_PATH_RATE", 0, "MODEL.DROPOUT", 0, "TRAIN.BASE_LR", 1e-3)
    config = tiny_config(tmp_path, *calm, "MODEL.AUX_WEIGHT", weight)
    run(config)
    random_seed(config.SEED)
    model = build_model(config)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.999), eps=1e-8)
    rates = [5e-7 + (1e-3 - 5e-7) * number / 3 for number in range(3)]
    rates += [5e-6 + (1e-3 - 5e-6) * (1 + math.cos(math.pi * number / 3)) / 2 for number in range(3)]
    told, means = [], []
    for epoch in range(2):
        loader = build_train_loader(config, rank=0, world_size=1)
        loader.set_epoch(epoch)
        losses = []
        for number, (images, targets) in enumerate(loader):
            assert images.shape == (4, 3, 32, 32) and targets.shape == (4, 32, 32) and IGNORED in targets
            for group in optimizer.param_groups:
                group["lr"] = rates[3 * epoch + number]
            maps = model.backbone(images)
            main, auxiliary = (
                F.interpolate(logits, size=(32, 32), mode="bilinear")
                for logits in (model.decode_head(maps), model.auxiliary_head(maps[2]))
            )
            parts = loss_by_hand(main, targets), weight * loss_by_hand(auxiliary, targets)
            optimizer.zero_grad()
            sum(parts).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            told.append([part.item() for part in parts])
            losses.append(sum(parts).item())
        means.append(np.mean(losses))
    written = re.findall(r"decode.loss_ce ([\d.]+) aux.loss_ce ([\d.]+)", log(config))
    assert np.array(written, float) == pytest.approx(np.array(told), abs=2e-4)
    assert [line["train_loss"] for line in metrics(config)] == pytest.approx(means, rel=1e-4)
    weights = saved(config)["model"]
    ended = torch.cat([weights[name].flatten() for name, _ in model.named_parameters()])
    by_hand = torch.nn.utils.parameters_to_vector(model.parameters())
    assert (ended - by_hand).norm() < 0.02 * (by_hand - start).norm()  # Adam moves what has no gradient by rounding


def test_accuracy_of_a_step_is_of_the_pixels_that_count():
    model = create_segmenter("upernet", "vmamba_nano", CLASSES, channels=8, aux_channels=4)
    images, targets = torch.randn(2, 3, 32, 32), torch.randint(CLASSES, (2, 32, 32))
    targets[:, :9] = IGNORED
    model.eval()
    right = (model(images).argmax(1) == targets)[:, 9:].float().mean()
    assert model(images, targets)["decode.acc_seg"].item() == pytest.approx(100 * right.item())
    nothing = model(images, torch.full_like(targets, IGNORED))
    assert all(value == 0 for value in nothing.values())  # a batch without a pixel that counts trains on


class Given:
    """A model whose predictions are given: pixels hold their class."""

    def __call__(self, images):
        return F.one_hot(images[:, 0].long(), CLASSES).permute(0, 3, 1, 2).float()


def counted(tmp_path, *pairs):
    """The meter of (predictions, truth) of images."""
    meter = IoU(tiny_config(tmp_path), CPU)
    for number, (predicted, truth) in enumerate(pairs):
        image = torch.as_tensor(predicted).float().expand(3, -1, -1)
        meter.add(Given(), [([image], torch.as_tensor(truth, dtype=torch.uint8), f"{number}")])
    return meter


def test_means_are_those_of_scikit_learn(tmp_path):
    random = np.random.default_rng(0)
    pairs = [(random.integers(CLASSES, size=(9, 13)), random.integers(CLASSES, size=(9, 13))) for _ in range(4)]
    for _, truth in pairs:
        truth[:3, :5] = IGNORED
    meter = counted(tmp_path, *pairs)
    predicted, truth = (np.concatenate([np.ravel(pair[which]) for pair in pairs]) for which in (0, 1))
    predicted, truth = predicted[truth != IGNORED], truth[truth != IGNORED]
    results = meter.results()
    assert results["mIoU"] == pytest.approx(100 * jaccard_score(truth, predicted, average="macro"))
    assert results["mAcc"] == pytest.approx(100 * recall_score(truth, predicted, average="macro"))
    assert results["aAcc"] == pytest.approx(100 * accuracy_score(truth, predicted))
    assert meter.details()["IoU"] == pytest.approx(100 * jaccard_score(truth, predicted, average=None))
    assert meter.details()["Acc"] == pytest.approx(100 * recall_score(truth, predicted, average=None))


def test_classes_that_are_absent(tmp_path):
    """0: there and found in part; 1: in the truth alone; 2: predicted alone; 3: where nothing counts; 4: nowhere."""
    truth = [[0, 0, 0, 1], [0, 0, 1, IGNORED]]
    predicted = [[0, 0, 0, 0], [0, 2, 0, 3]]
    meter = counted(tmp_path, (predicted, truth))
    results = meter.results()
    iou, accuracy = [100 * 4 / 7, 0.0, 0.0, None, None], [100 * 4 / 5, 0.0, None, None, None]
    assert meter.details() == {"IoU": pytest.approx(iou), "Acc": pytest.approx(accuracy)}
    expected = {"mIoU": 100 * 4 / 7 / 3, "mAcc": 40.0, "aAcc": 100 * 4 / 7}
    assert results == pytest.approx(expected)


def test_a_data_set_in_which_no_pixel_counts(tmp_path):
    meter = counted(tmp_path, ([[0]], [[IGNORED]]))
    with pytest.raises(UserError, match=r"no pixel of the validation images counts; check DATA.DATA_PATH '.*images'"):
        meter.results()


@pytest.fixture(scope="module")
def segmenter():
    random_seed(0)
    return create_segmenter("upernet", "vmamba_nano", CLASSES, channels=8, aux_channels=4).eval()


def test_windows_are_averaged_where_they_overlap(tmp_path, segmenter):
    size, stride = (24, 40), (16, 24)
    options = ("TEST.MODE", "slide", "DATA.CROP_SIZE", list(size), "TEST.STRIDE", list(stride))
    infer = Inference(tiny_config(tmp_path, *options))
    image = torch.randn(3, 50, 70)
    total, count = torch.zeros(CLASSES, 50, 70), torch.zeros(50, 70)
    for y in (0, 16, 26):  # the last one ends with the image
        for x in (0, 24, 30):
            with torch.no_grad():
                total[:, y : y + 24, x : x + 40] += segmenter(image[None, :, y : y + 24, x : x + 40])[0]
            count[y : y + 24, x : x + 40] += 1
    with torch.no_grad():
        torch.testing.assert_close(infer._logits(segmenter, image)[0], total / count)
        assert torch.equal(infer(segmenter, [image], (50, 70)), (total / count).argmax(0).to(torch.uint8))


@pytest.mark.parametrize(("size", "expected"), [((10, 40), [(0, 0)]), ((24, 41), [(0, 0), (0, 1)])])
def test_windows_of_an_image_that_is_smaller_or_a_little_larger(size, expected):
    assert [(y.start, x.start) for y, x in windows(size, (24, 40), (16, 24))] == expected


def test_scales_and_the_mirrored_image_are_averaged(tmp_path, segmenter):
    images = [torch.randn(3, 32, 44), torch.randn(3, 48, 66)]
    total = 0
    with torch.no_grad():
        for image in images:
            logits = segmenter(image[None])
            mirrored = segmenter(image.flip(-1)[None]).flip(-1)
            for each in (logits, mirrored):
                total = total + F.interpolate(each, size=(30, 41), mode="bilinear").softmax(1)[0]
        found = Inference(tiny_config(tmp_path, "TEST.FLIP", True))(segmenter, images, (30, 41))
    assert torch.equal(found, total.argmax(0).to(torch.uint8))


def test_what_is_decayed_of_a_segmenter():
    """Neither norms, nor biases, nor maps of positions, wherever in the model they are."""
    ours, swin = ("vmamba_nano", {"pos_embed": True, "img_size": 32}), ("timm/swin_tiny_patch4_window7_224", {})
    for backbone, options in (ours, swin):
        with torch.device("meta"):
            model = create_segmenter("upernet", backbone, CLASSES, backbone_options=options)
        decayed, _ = parameter_groups(model, 0.05)
        kept = {id(weight) for weight in decayed["params"]}
        names = {name for name, weight in model.named_parameters() if id(weight) in kept}
        assert not [name for name in names if re.search(r"\.bias$|norm|\.bn\.|pos_embed|relative_position", name)]
        assert {"decode_head.conv_seg.weight", "decode_head.bottleneck.conv.weight"} <= names
        assert len(without_wrappers(model.state_dict())) > len(names) > 30


@pytest.mark.parametrize("size", [(20, 28), (7, 40), (1, 1), (3, 5), (5, 7)])
@pytest.mark.parametrize("part", ["resize", "pool"])
def test_products_are_pytorchs_resizing_and_pooling(monkeypatch, part, size):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 3, *size)
    if part == "resize":
        function = partial(resize, size=size)
    else:
        function, grad = Pool(size[0]), grad[..., :1].expand(2, 3, size[0], size[0])
    theirs = function(x)
    monkeypatch.setattr("vmamba.segmentation.upernet._in_training_on_a_gpu", lambda x: True)
    ours = function(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
