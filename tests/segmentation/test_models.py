"""Segmenters by name and from files: published sizes and costs, the released names, both of their spellings."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import vmamba
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models.flops import complexity
from vmamba.models.pretrained import open_checkpoint
from vmamba.models.released import to_released
from vmamba.models.variants import VARIANTS
from vmamba.models.whole import start_whole
from vmamba.segmentation.models import build_model, create_segmenter, load_segmenter, segmenter_from_released

from .tiny import CLASSES, ROOT

EXACT = {  # with 150 classes and the auxiliary head
    "vmamba_tiny": 54_546_956,
    "vmamba_small": 76_070_924,
    "vmamba_base": 109_765_548,
    "vmamba_tiny_s1l8": 61_902_572,
    "vmamba_small_s2l15": 81_801_260,
    "vmamba_base_s2l15": 122_069_292,
}
CONFIGS = sorted((ROOT / "configs/segmentation").glob("upernet_*.yaml"))


def on_meta(backbone, **options):
    with torch.device("meta"):
        return create_segmenter("upernet", backbone, **options)


@pytest.mark.parametrize("name", EXACT)
def test_parameters(name):
    model = on_meta(name)
    assert sum(weight.numel() for weight in model.parameters()) == EXACT[name]
    if VARIANTS[name].options["dims"] == 96:
        assert sum(weight.numel() for weight in model.auxiliary_head.parameters()) == 923_798


@pytest.mark.parametrize(("name", "gflops"), [("vmamba_tiny", 964), ("vmamba_base_s2l15", 1170)])
def test_multiply_adds_of_the_table(name, gflops):
    assert complexity(on_meta(name), (512, 2048)).macs / 1e9 == pytest.approx(gflops, rel=0.005)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_builds(path):
    config, header = get_config(path), re.match(r"(#.*\n)+", path.read_text()).group()
    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"{parameters:,} parameters" in header
    assert f"main.py --cfg configs/segmentation/{path.name} " in header and "To expect: " in header
    assert path.stem.removeprefix("upernet_").removesuffix("_640") == re.sub("timm/|_patch.*", "", config.MODEL.NAME)
    weights = re.search(r"--pretrained (\S+)", header).group(1)
    variant = VARIANTS.get(config.MODEL.NAME)
    assert (
        weights == variant.weights if variant else weights.endswith(f"/{config.MODEL.NAME.removeprefix('timm/')}.pth")
    )
    assert config.DATA.SCALE == [config.DATA.CROP_SIZE, 4 * config.DATA.CROP_SIZE]


def test_the_recipe_on_ade20k():
    """The numbers of downstream.md; the backbones differ in stochastic depth alone."""
    drop_path = {"vmamba_tiny_s1l8": 0.2, "vmamba_small_s2l15": 0.3, "vmamba_base_s2l15": 0.6}
    assert len(CONFIGS) == 11
    for path in CONFIGS:
        config = get_config(path)
        train, aug, model = config.TRAIN, config.AUG, config.MODEL
        expected = 0.3 if model.NAME.startswith("timm/swin") else drop_path.get(model.NAME, 0.1)
        assert (model.DROP_PATH_RATE or VARIANTS[model.NAME].options["drop_path_rate"]) == expected
        assert (train.STEPS, train.WARMUP_STEPS, config.EVAL_STEPS) == (160_000, 1500, 16_000)
        assert (train.BASE_LR, train.WARMUP_LR, train.MIN_LR, train.LR_REFERENCE_BATCH) == (6e-5, 6e-11, 0, 16)
        assert (train.OPTIMIZER.NAME, train.OPTIMIZER.BETAS, train.WEIGHT_DECAY) == ("adamw", [0.9, 0.999], 0.01)
        assert (train.LR_SCHEDULER.NAME, train.CLIP_GRAD, train.EMA.ENABLE) == ("linear", 0, False)
        assert (aug.RESIZE_RATIO, aug.MOST_OF_ONE_CLASS, aug.HFLIP, aug.PHOTOMETRIC) == ([0.5, 2.0], 0.75, 0.5, True)
        assert (model.CHANNELS, model.AUX_CHANNELS, model.AUX_WEIGHT, model.DROPOUT) == (512, 256, 0.4, 0.1)
        assert (model.SYNC_BN, config.DATA.IGNORE_INDEX, model.NUM_CLASSES, config.DATA.BATCH_SIZE) == (
            True,
            255,
            150,
            4,
        )
        assert (config.TEST.MODE, config.TEST.SCALES, config.TEST.FLIP) == ("whole", [1.0], False)


def as_released(model, january=False):
    """The state dict as mmsegmentation writes it."""
    heads = {name: weight for name, weight in model.state_dict().items() if not name.startswith("backbone.")}
    backbone = to_released(model.backbone, january=january)
    return {f"backbone.{name}": weight for name, weight in backbone.items()} | heads


@pytest.mark.parametrize(("name", "january"), [("vmamba_tiny", True), ("vmamba_nano", False)])
def test_a_released_file_says_what_it_is(tmp_path, name, january):
    """In both spellings, with the pickles of optimiser and logger beside."""
    model = create_segmenter("upernet", name, 7, channels=16, aux_channels=8).eval()
    weights = as_released(model, january)
    assert any(".self_attention." in key for key in weights) is january
    torch.save({"meta": {}, "state_dict": weights, "optimizer": {"state": Path("x")}}, tmp_path / "iter_160000.pth")
    loaded = load_segmenter(tmp_path / "iter_160000.pth")
    for (key, weight), (theirs, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == theirs and torch.equal(weight, other)


def test_a_file_with_a_wrong_head_is_refused(tmp_path):
    weights = as_released(create_segmenter("upernet", "vmamba_nano", 7, channels=16, aux_channels=8))
    weights["decode_head.bottleneck.conv.weight"] = torch.zeros(16, 5, 3, 3)
    del weights["auxiliary_head.convs.0.conv.weight"]
    torch.save({"state_dict": weights}, tmp_path / "odd.pth")
    both = (
        r"odd\.pth' is of another architecture: 1 missing: auxiliary_head.*; 1 of another shape: decode_head.bottleneck"
    )
    with pytest.raises(UserError, match=both):
        load_segmenter(tmp_path / "odd.pth")
    weights["backbone.patch_embed.0.weight"] = torch.zeros(5, 3, 3, 3)
    torch.save({"state_dict": weights}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"the backbone in '.*other\.pth' is none of the models by name"):
        load_segmenter(tmp_path / "other.pth")
    config = {"backbone": {"depths": [1, 1, 2, 1]}, "num_classes": 7}
    with pytest.raises(UserError, match="the state dict' is of another architecture|do not fit"):
        segmenter_from_released(config, as_released(create_segmenter("upernet", "vmamba_nano", 7, channels=16)))


@pytest.mark.parametrize(("name", "case"), [("vmamba_tiny", "upernet_tiny"), ("vmamba_tiny_s1l8", "upernet_tiny_s1l8")])
def test_names_and_shapes_are_the_released_ones(name, case):
    expected = json.loads((ROOT / "tests/data/released_downstream_keys.json").read_text())[case]
    shapes = {key: list(weight.shape) for key, weight in as_released(on_meta(name)).items()}
    assert {key: shape for key, shape in shapes.items() if ".layers." not in key} == expected


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_timms_backbones_start_from_a_file_of_the_whole_model(tmp_path, name):
    whole = timm.create_model(name, num_classes=10)
    torch.save({"model": whole.state_dict()}, tmp_path / "whole.pth")
    model = create_segmenter("upernet", f"timm/{name}", CLASSES, channels=8, aux_channels=4)
    backbone = model.backbone
    start_whole(model, open_checkpoint(tmp_path / "whole.pth"), drop_head=False)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = whole.eval().forward_intermediates(image, intermediates_only=True)
        last = backbone.eval().model(image)[-1]
    assert torch.equal(last, features[-1])
    lacking = {key: weight for key, weight in whole.state_dict().items() if "norm" not in key and "bn" not in key}
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(UserError, match=r"lacking\.pth' is of another architecture: \d+ missing: .*(norm|bn)"):
        backbone.start_from(open_checkpoint(tmp_path / "lacking.pth"))


def test_the_api_names_what_is_unknown():
    assert vmamba.create_segmenter is create_segmenter
    for (names, options), sentence in (
        ((("upernett",), {}), "unknown segmenter 'upernett'"),
        ((("upernet", "vmamba_tinny"), {}), "did you mean 'vmamba_tiny'"),
        ((("upernet", "vmamba_nano"), {"chanels": 8}), "did you mean 'channels'"),
        ((("upernet", "timm/vit_tiny_patch16_224"), {}), "timm's 'vit_tiny_.*' gives no feature maps of strides 4, 8"),
        ((("upernet", vmamba.create_model("vmamba_nano")), {}), "the backbone is a VSSM; give the name of a model"),
        ((("upernet", "vmamba_nano", 0), {}), "num_classes is 0; it must be at least 1"),
        ((("upernet", "vmamba_nano", "80"), {}), "num_classes is '80' .str.; expected an integer"),
        ((("upernet", "vmamba_nano", 300), {}), "num_classes is 300, and label 255, .* give another ignore_index"),
        ((("upernet", "vmamba_nano"), {"pool_scales": (0,)}), r"pool_scales is \[0\]; it must be at least 1"),
        ((("upernet", "vmamba_nano"), {"dropout": 2.0}), "dropout is 2.0; it must be between 0 and 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            create_segmenter(*names, **options)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            torch.zeros(1, 32, 32, dtype=torch.long),
            r"the shape \(1, 32, 32\); expected \(2, 32, 32\), a label",
        ),
        (torch.zeros(2, 16, 16, dtype=torch.long), r"the shape \(2, 16, 16\); expected \(2, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.long), r"the shape \(2, 1, 32, 32\); expected"),
        (torch.zeros(2, 32, 32), "targets are of torch.float32; expected integers"),
    ],
)
def test_targets_that_do_not_fit(targets, sentence):
    model = create_segmenter("upernet", "vmamba_nano", CLASSES, channels=8, aux_channels=4)
    with pytest.raises(UserError, match=sentence):
        model(torch.randn(2, 3, 32, 32), targets)
    with pytest.raises(UserError, match=r"images have shape \(3, 32, 32\); a segmenter takes"):
        model(torch.randn(3, 32, 32))


def test_labels_of_no_class_and_a_single_image_are_refused_in_training():
    model = create_segmenter("upernet", "vmamba_nano", CLASSES, channels=8, aux_channels=4, ignore_index=9)
    images, targets = torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), 9)
    assert model(images, targets)["decode.loss_ce"] == 0
    for wrong in (CLASSES, 8, 255, -1):
        targets[1, 2, 3] = wrong
        with pytest.raises(
            UserError, match=f"targets hold label {wrong}; the model has {CLASSES} classes, counted from"
        ):
            model(images, targets)
    targets[1, 2, 3] = CLASSES - 1
    with pytest.raises(
        UserError, match="a single image cannot be trained on: .*; give two or more, or call model.eval"
    ):
        model(images[:1], targets[:1])
    assert model.eval()(images[1:], targets[1:])["decode.loss_ce"] > 0
    apart = create_segmenter("upernet", "vmamba_nano", CLASSES, channels=8, aux_channels=4, pool_scales=(2, 3))
    assert apart(torch.randn(1, 3, 64, 64)).shape == (1, CLASSES, 64, 64)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("decode_head.conv_seg.weight", (3,), r"decode_head.conv_seg.weight of shape \(3,\); expected 4 dimensions"),
        ("decode_head.conv_seg.weight", (300, 16, 1, 1), r"conv_seg.weight of shape \(300, .* the first from 1 to 254"),
        ("auxiliary_head.conv_seg.weight", (3,), r"auxiliary_head.conv_seg.weight of shape \(3,\); expected 4"),
    ],
)
def test_a_head_that_does_not_say_its_size_is_named_with_its_file(tmp_path, name, shape, sentence):
    weights = as_released(create_segmenter("upernet", "vmamba_nano", 7, channels=16, aux_channels=8))
    weights[name] = torch.zeros(shape)
    torch.save({"state_dict": weights}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=rf"odd\.pth' holds .*{sentence}"):
        load_segmenter(tmp_path / "odd.pth")


def test_a_released_config_is_read_whole():
    weights = as_released(create_segmenter("upernet", "vmamba_nano", 7, channels=16, aux_channels=8))
    backbone = {"depths": [1, 1, 1, 1]}
    for config, sentence in (
        (
            {"backbone": backbone, "num_classes": 7, "chanels": 3},
            "option in the config 'chanels'; did you mean 'channels'",
        ),
        ({"backbone": backbone}, "the config lacks num_classes; it has backbone"),
        ({"num_classes": 7}, "the config lacks backbone"),
        ({"backbone": backbone, "num_classes": 0}, "num_classes is 0; it must be at least 1"),
        (7, "the config is 7; expected a mapping"),
    ):
        with pytest.raises(UserError, match=sentence):
            segmenter_from_released(config, weights)
