"""What one line of the library gives: parts of the model alone, frozen stages, transforms, costs."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import vmamba
from vmamba.classification.transforms import build_transform
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models.flops import complexity
from vmamba.models.pretrained import channels_of


def test_parts_alone_are_those_of_the_model():
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_digits", dims=8, depths=(1, 1)).eval()
    inside, x = model.layers[1].blocks[0], torch.randn(2, 4, 3, 16)
    options = dict(d_state=1, ssm_ratio=1.0, gate=False, ssm_conv_bias=False)
    block, scan = vmamba.Block(16, **options).eval(), vmamba.SS2D(16, **options).eval()
    block.load_state_dict(inside.state_dict())
    scan.load_state_dict(inside.op.state_dict())
    assert torch.equal(block(x), inside(x)) and torch.equal(scan(x), inside.op(x))
    assert torch.equal(block(x), model.layers[1](x))
    assert vmamba.Block(6)(torch.randn(1, 3, 5, 6)).shape == (1, 3, 5, 6)
    assert vmamba.Block(6, mlp_ratio=0, norm_layer="bn").mlp is None


@pytest.mark.parametrize("kind", ["Block", "SS2D"])
def test_a_part_that_is_given_what_it_does_not_take_says_so(kind):
    part = getattr(vmamba, kind)(6)
    takes = rf"this {kind} takes \(batch, height, width, 6\)"
    with pytest.raises(UserError, match=rf"\(2, 6, 4, 5\), and {takes}; its channels come first: .*permute\(0, 2, 3"):
        part(torch.randn(2, 6, 4, 5))
    for shape in ((2, 5, 4, 7), (4, 4, 6), (6,)):
        with pytest.raises(UserError, match=f"{takes}$"):
            part(torch.randn(shape))
    for shape in ((2, 0, 4, 6), (2, 4, 0, 6)):
        with pytest.raises(UserError, match=f"which has no pixel; this {kind} takes one or more"):
            part(torch.randn(shape))
    for x, words in (
        (np.zeros((1, 4, 4, 6), np.float32), "a ndarray"),
        (None, "a NoneType"),
        (torch.zeros(1, 4, 4, 6, dtype=torch.uint8), "of torch.uint8"),
    ):
        with pytest.raises(UserError, match=rf"x is {words}; this {kind} takes a tensor \(batch, height, width, 6\)"):
            part(x)
    for dim, words in ((0, "dim is 0; it must be between 1"), ("6", r"dim is '6' \(str\); expected an integer")):
        with pytest.raises(UserError, match=words):
            getattr(vmamba, kind)(dim)
    with pytest.raises(UserError, match="unknown model option 'dstate'; did you mean 'd_state'"):
        getattr(vmamba, kind)(6, dstate=1)
    for name in ("depths", "dims", "patch_size", "num_classes", "drop_path_rate", "route_turns"):  # of a model
        with pytest.raises(UserError, match=f"unknown model option '{name}'"):
            getattr(vmamba, kind)(6, **{name: 1})


def test_block_bounds_its_drop_path():
    with pytest.raises(UserError, match="drop_path_rate is 1.5"):
        vmamba.Block(6, drop_path=1.5)


def test_frozen_stages():
    model = vmamba.create_model("vmamba_digits", dims=8, depths=(1, 1), pos_embed=True, img_size=32, norm_layer="bn")
    assert model.freeze(1) is model
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    wanted = ("patch_embed.", "pos_embed", "layers.0.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(wanted)}
    assert model.train().training and not model.layers[0].training and model.layers[1].training
    before = model.layers[0].blocks[0].norm.running_mean.clone()
    model(torch.randn(2, 3, 32, 32))
    assert torch.equal(model.layers[0].blocks[0].norm.running_mean, before)
    assert {name for name, weight in model.freeze(2).named_parameters() if weight.requires_grad} == {
        "classifier.head.weight",
        "classifier.head.bias",
    }
    for stages, parts in ((1, wanted), (0, wanted[:2])):  # fewer than before
        frozen = {name for name, weight in model.freeze(stages).named_parameters() if not weight.requires_grad}
        assert frozen == {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert model.layers[0].training and not model.patch_embed.training
    assert not model.eval().freeze(1).layers[1].training
    backbone = vmamba.Backbone(vmamba.create_model("vmamba_digits", dims=8, depths=(1, 1)), (0, 1))
    backbone.model.freeze(2)  # its norms are left
    assert {name for name, weight in backbone.named_parameters() if weight.requires_grad} == {
        f"outnorm{stage}.{name}" for stage in (0, 1) for name in ("weight", "bias")
    }
    assert backbone.train().model.layers[0].training is False
    for stages in (3, -1, "all"):
        with pytest.raises(UserError, match="stages is"):
            model.freeze(stages)


def photograph(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    return Image.fromarray(pixels).resize((300, 250)).convert(mode)


def test_transforms_of_models(tmp_path):
    image = photograph()
    image.save(tmp_path / "it.png")
    ours = vmamba.build_transform(vmamba.create_model("vmamba_digits"))
    peer = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875)
    torch.testing.assert_close(ours(image), peer(image))
    assert torch.equal(ours(tmp_path / "it.png"), ours(image)) and torch.equal(ours(image.convert("RGBA")), ours(image))
    timms = timm.create_model("test_vit")  # of 160 pixels and other constants
    data = timm.data.resolve_data_config({}, model=timms)
    assert torch.equal(vmamba.build_transform(timms)(image), create_transform(**data)(image))
    model = vmamba.create_model("vmamba_digits", in_chans=1)
    with pytest.raises(UserError, match="this VSSM does not tell how its images are normalised; take it from vmamba"):
        vmamba.build_transform(model)
    model.config = get_config("configs/vmamba_digits.yaml")
    wanted = build_transform(model.config, training=False)(image.convert("L"))
    assert torch.equal(vmamba.build_transform(model)(image), wanted) and wanted.shape == (1, 32, 32)
    model.config = get_config("configs/scenes_detection.yaml")
    with pytest.raises(UserError, match="this model is of detection, whose images come in many sizes; vmamba.predict"):
        vmamba.build_transform(model)
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(UserError, match="cannot read '.*no.png'"):
        ours(tmp_path / "no.png")


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["resnet18", "vmamba_digits"])
def test_timms_settings_are_of_the_channels_that_its_model_takes(name, channels):
    """create_model keeps those of three channels whatever it builds."""
    model = timm.create_model(name, in_chans=channels)
    words = f"takes images of {channels} channels?, and its settings of timm tell how those of 3 are normalised; "
    with pytest.raises(UserError, match=words + "give timm.create_model pretrained_cfg_overlay=dict.input_size="):
        vmamba.build_transform(model)
    told = dict(input_size=(channels, 64, 64), mean=(0.5,) * channels, std=(0.25,) * channels, crop_pct=1.0)
    model = timm.create_model(name, in_chans=channels, pretrained_cfg_overlay=told)
    if channels == 4:
        with pytest.raises(UserError, match="takes images of 4 channels, and timm's transforms are of 1 and 3"):
            vmamba.build_transform(model)
        return
    image = Image.new("RGB", (70, 80), (255, 255, 255))
    made = vmamba.build_transform(model)(image)
    assert torch.equal(made, torch.full((1, 64, 64), 2.0)) and model.eval()(made[None]).shape[0] == 1


def test_channels_are_not_those_of_a_convolution_behind_a_rearrangement():
    model = timm.create_model("tresnet_m")  # its first convolution takes patches of 4 x 4 pixels
    assert channels_of(model) == 3 and vmamba.build_transform(model)(photograph()).shape == (3, 224, 224)


def test_costs_and_a_name_of_timms():
    model = vmamba.create_model("vmamba_digits")
    assert vmamba.flops(model, (32, 64)) == complexity(model, (32, 64)).macs > vmamba.flops(model, 32)
    assert vmamba.flops(timm.create_model("resnet18")) == pytest.approx(1.82e9, rel=0.01)
    words = "this SwinTransformer does not take images of 100 x 100 pixels .*; give another size"
    with pytest.raises(UserError, match=words):
        vmamba.flops(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), 100)
    with pytest.raises(UserError, match="images are 2 x 2 pixels; this model.s patches need"):
        vmamba.flops(vmamba.create_model("vmamba_tiny", depths=(1,), dims=8), 2)
    with pytest.raises(UserError, match=r"features_only is timm's: timm.create_model\('vmamba_tiny', feat"):
        vmamba.create_model("vmamba_tiny", features_only=True)
    assert vmamba.__version__


def test_what_has_no_costs_is_a_sentence():
    model = vmamba.create_model("vmamba_digits")
    assert vmamba.flops(model, np.int64(64)) == vmamba.flops(model, (np.int32(64), 64)) == vmamba.flops(model, 64)
    for size in (True, (True, 64), 0, 64.0, "64", (64,), None):
        with pytest.raises(UserError, match=f"size is {re.escape(repr(size))}; expected a side in pixels, or .height"):
            vmamba.flops(model, size)
    for layer in (torch.nn.Linear(4, 4), torch.nn.Identity()):
        with pytest.raises(UserError, match="has no convolution, so it takes no images; give one that does"):
            vmamba.flops(layer, 64)


def test_the_page_of_the_library_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["x"].shape == (2, 14, 14, 96)
    assert capsys.readouterr().out.splitlines()[-1] == "[(1, 32, 16, 16), (1, 64, 8, 8)]"
