"""Detectors by name, by config and from files: counts, names and shapes as released, both spellings, recipes."""

import json
import re
from pathlib import Path

import pytest
import torch

import vmamba
from vmamba.analysis.prediction import predict
from vmamba.config import get_config, output_folder
from vmamba.detection.models import build_model
from vmamba.errors import UserError
from vmamba.models.flops import complexity
from vmamba.models.released import to_released
from vmamba.models.variants import VARIANTS, Variant
from vmamba.runtime.trainer import run

from ..classification.tiny import ROOT
from .tiny import tiny_config

DATA = ROOT / "tests" / "data"
RECIPES = sorted((ROOT / "configs" / "detection").glob("mask_rcnn_*.yaml"))
PARAMETERS = {  # of 80 classes
    "vmamba_tiny": 42_399_696,
    "vmamba_small": 63_923_664,
    "vmamba_base": 95_627_632,
    "vmamba_tiny_s1l8": 49_755_312,
    "vmamba_small_s2l15": 69_654_000,
    "vmamba_base_s2l15": 107_931_376,
}


def on_meta(name, **options):
    with torch.device("meta"):
        return vmamba.create_detector("mask_rcnn", backbone=name, **options)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_released_models(name):
    assert sum(weight.numel() for weight in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "giga"), [("vmamba_tiny", 286), ("vmamba_tiny_s1l8", 271)])
def test_multiply_adds_are_those_of_the_tables(name, giga):
    assert complexity(on_meta(name), (1280, 800)).macs / 1e9 == pytest.approx(giga, rel=0.005)


def test_neck_and_heads_have_the_released_names_and_shapes():
    listed = json.loads((DATA / "released_downstream_keys.json").read_text())
    for released, name in (("mask_rcnn_tiny", "vmamba_tiny"), ("mask_rcnn_tiny_s1l8", "vmamba_tiny_s1l8")):
        model = on_meta(name)
        ours = {key: list(weight.shape) for key, weight in model.state_dict().items()}
        expected = {
            model.name_of_head(key).replace("backbone.", "backbone.model.", "outnorm" not in key): shape
            for key, shape in listed[released].items()
        }
        assert {key: ours.get(key) for key in expected} == expected
        assert {key for key in ours if not key.startswith("backbone.model.layers.")} == expected.keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("file"), "TRAIN.EPOCHS", 1)
    run(config)
    return config


def test_a_detector_is_loaded_from_a_run(trained):
    model = vmamba.load_detector(output_folder(trained) / "last.pth", "ema")
    torch.manual_seed(0)
    image = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        (found,) = model(image)
    assert not model.training and model.predictions.score_thr == trained.TEST.SCORE
    assert found["masks"].shape == (len(found["boxes"]), 50, 70) and found["masks"].dtype == torch.bool
    assert (found["scores"].diff() <= 0).all() and found["labels"].max() < 3
    saved = torch.load(output_folder(trained) / "last.pth", weights_only=True)["model_ema"]
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("january", [True, False])
def test_a_file_of_mmdetection_is_loaded_whole(tmp_path, monkeypatch, january):
    """As the released ones, in both spellings: a state dict with what the optimiser and the logger pickled beside."""
    small = VARIANTS["vmamba_tiny" if january else "vmamba_tiny_s1l8"].options | {"depths": (1, 1, 1, 1), "dims": 8}
    name = f"vmamba_smallest_{january}"  # what is known of a name is kept
    monkeypatch.setitem(VARIANTS, name, Variant(small))
    torch.manual_seed(0)
    model = vmamba.create_detector("mask_rcnn", name, 3, channels=8, hidden=16)
    held = {f"backbone.{name}": weight for name, weight in to_released(model.backbone, january=january).items()}
    held |= {as_released(name): weight for name, weight in model.state_dict().items() if "backbone." not in name}
    assert "neck.lateral_convs.0.conv.weight" in held
    assert ("backbone.layers.0.blocks.0.self_attention.x_proj_weight" in held) is january
    path = tmp_path / "epoch_12.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": held, "optimizer": {"state": {}}, "message_hub": Path("x")}, path)
    loaded = vmamba.load_detector(path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert loaded.num_classes == 3
    held["roi_head.bbox_head.fc_reg.weight"] = torch.zeros(5, 16)
    torch.save(held, path)
    with pytest.raises(UserError, match=r"epoch_12.pth'.*roi_head.bbox_head.fc_reg.weight.*\(5, 16\).*\(12, 16\)"):
        vmamba.load_detector(path)
    del held["roi_head.mask_head.conv_logits.bias"]
    torch.save(held, path)
    with pytest.raises(UserError, match="missing: .*conv_logits.bias"):
        vmamba.load_detector(path)


@pytest.mark.parametrize(
    ("name", "weight", "sentence"),
    [
        ("rpn_head.rpn_conv.weight", None, "is no whole model: it has no rpn_head.rpn_conv.weight"),
        (
            "rpn_head.rpn_conv.weight",
            torch.tensor(1.0),
            r"holds rpn_head.rpn_conv.weight of shape \(\); expected 4 dim",
        ),
        ("roi_head.bbox_head.fc_cls.weight", torch.zeros(8), r"fc_cls.weight of shape \(8,\); expected 2 dimensions"),
        ("roi_head.bbox_head.fc_cls.weight", torch.zeros(8, 2, 2, 2), r"of shape \(8, 2, 2, 2\); expected 2"),
        ("roi_head.bbox_head.fc_cls.weight", torch.zeros(1, 16), r"of shape \(1, 16\); .* the first from 2 to 1000000"),
        ("roi_head.bbox_head.fc_cls.weight", torch.zeros(4, 0), r"of shape \(4, 0\); expected 2 dimensions"),
    ],
)
def test_a_head_that_does_not_say_its_size_is_named_with_its_file(tmp_path, name, weight, sentence):
    held = vmamba.create_detector("mask_rcnn", "vmamba_nano", 3, channels=8, hidden=16).state_dict()
    held = {key: value for key, value in (held | {name: weight}).items() if value is not None}
    torch.save(held, tmp_path / "odd.pth")
    for load in (vmamba.load_detector, lambda path: predict(str(path), [str(path)], output=str(tmp_path / "out"))):
        with pytest.raises(UserError, match=rf"odd.pth' .*{sentence}"):
            load(tmp_path / "odd.pth")


def test_a_released_config_is_read_whole():
    case = torch.load(DATA / "golden_downstream" / "mask_rcnn_s1.pt", weights_only=True)
    config, weights = case["config"], case["state_dict"]
    for change, sentence in (
        ({"fpn_chanels": 32}, "unknown option in the config 'fpn_chanels'; did you mean 'fpn_channels'"),
        ({"test": {"foo": 5}}, "unknown option in test of the config 'foo'; known: mask_thr, max_dets, "),
        ({"train": {"score_thr": 0.1}}, "unknown option in train of the config 'score_thr'"),
        ({"test": {"nms": 5}}, "nms is 5.0; it must be between 0 and 1"),
        ({"test": {"max_dets": 0.5}}, "max_dets is 0.5 .float.; expected an integer"),
        ({"train": 7}, "train of the config is 7; expected a mapping"),
        ({"fc_channels": 0}, "hidden is 0; it must be at least 1"),
        ({"backbone": None}, "the config lacks backbone; it has fpn_channels, fc_channels, num_classes, train, test"),
        ({"num_classes": None}, "the config lacks num_classes"),
    ):
        given = {name: value for name, value in (config | change).items() if value is not None}
        with pytest.raises(UserError, match=sentence):
            vmamba.detector_from_released(given, weights)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_classes": -1}, "num_classes is -1; it must be at least 1"),
        ({"num_classes": "80"}, "num_classes is '80' .str.; expected an integer"),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"samples": 0.5}, "samples is 0.5 .float.; expected an integer"),
        ({"proposals": 1000}, "proposals is 1000 .int.; expected ProposalSettings"),
        ({"backbone": torch.nn.Identity()}, "the backbone is a Identity; give the name of a model"),
    ],
)
def test_options_that_cannot_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        vmamba.create_detector("mask_rcnn", **({"backbone": "vmamba_nano"} | options))


def as_released(name):
    name = re.sub(r"^neck\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv.", name)
    return re.sub(r"^neck\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv.", name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_builds_and_is_mmdetections(path):
    config = get_config(path)
    header = re.match(r"(#.*\n)+", path.read_text()).group()
    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"{parameters:,} parameters" in header
    assert parameters == PARAMETERS.get(config.MODEL.NAME, parameters)
    assert f"main.py --cfg configs/detection/{path.name}" in header and "To expect: " in header
    train, aug, long = config.TRAIN, config.AUG, path.stem.endswith("_3x")
    assert (config.TASK, config.MODEL.NUM_CLASSES, config.DATA.DATASET) == ("detection", 80, "coco")
    assert (train.BASE_LR, train.WEIGHT_DECAY, train.LR_REFERENCE_BATCH) == (1e-4, 0.05, 16)
    assert (train.OPTIMIZER.NAME, train.WARMUP_STEPS, train.WARMUP_LR) == ("adamw", 1000, 1e-7)
    schedule = train.LR_SCHEDULER
    assert (schedule.NAME, schedule.DECAY_RATE) == ("multistep", 0.1)
    assert ((36, [27, 33]) if long else (12, [8, 11])) == (train.EPOCHS, schedule.MULTISTEPS)
    assert ([800, 1333], 32, 0.5, 0.5 * long) == (config.DATA.SCALE, config.DATA.DIVISOR, aug.HFLIP, aug.CROP)
    assert ([*range(480, 801, 32)] if long else []) == aug.SHORT_SIDES
    stem = path.stem.removeprefix("mask_rcnn_").removesuffix("_1x").removesuffix("_3x")
    assert stem == re.sub("timm/|_patch.*", "", config.MODEL.NAME)
    weights = re.search(r"--pretrained (\S+)", header).group(1)
    if stem in VARIANTS:
        later = re.search(r"_s\dl\d", stem)
        own = VARIANTS[stem].options["drop_path_rate"]
        assert (None if later else 0.1) == config.MODEL.DROP_PATH_RATE and (not later or own in (0.2, 0.3, 0.6))
        assert weights == VARIANTS[stem].weights
    else:
        assert f"/{config.MODEL.NAME.removeprefix('timm/')}." in weights


def test_there_is_a_recipe_for_every_row_of_the_table():
    vmamba_1x = [f"mask_rcnn_{name}_1x" for name in PARAMETERS]
    vmamba_3x = [f"mask_rcnn_{name}_3x" for name in PARAMETERS if "base" not in name]
    swin = [f"mask_rcnn_swin_{size}_{schedule}" for size in ("tiny", "small", "base") for schedule in ("1x", "3x")]
    swin.remove("mask_rcnn_swin_base_3x")
    assert [path.stem for path in RECIPES] == sorted([*vmamba_1x, *vmamba_3x, *swin])
