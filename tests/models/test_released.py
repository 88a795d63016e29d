"""Released options and keys: every one known, either spelling, and nothing that does not fit gets in."""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch

import vmamba
from vmamba.models.released import from_released, keys_from_released, options_from_released, to_released

KEYS = json.loads((Path(__file__).parents[1] / "data" / "released_state_dict_keys.json").read_text())
SMALL = dict(dims=16, depths=[1, 1], num_classes=5, ssm_d_state=1, mlp_ratio=2.0, patchembed_version="v2")


def variant(name):
    """Our name of a released list."""
    return "vmamba_" + name.partition(" ")[0].removeprefix("vanilla_")


def released(**options):
    """A small model's options and its weights in the later spelling."""
    torch.manual_seed(0)
    options = SMALL | options
    model = vmamba.VSSM(**options_from_released(options))
    for name, parameter in model.named_parameters():
        if name.endswith("dt_projs_bias"):  # so that the scan's memory shows in the logits
            parameter.data.fill_(-1.0)
        if name.endswith("x_proj_weight"):
            parameter.data.mul_(8)
    return options, {name: weight.detach() for name, weight in to_released(model).items()}


@pytest.mark.parametrize("name", KEYS)
def test_every_key_of_the_released_variants_maps_both_ways(name):
    with torch.device("meta"):
        model = vmamba.create_model(variant(name))
        released_weights = {key: torch.empty(shape) for key, shape in KEYS[name].items()}
    own = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    assert {key: list(weight.shape) for key, weight in keys_from_released(released_weights).items()} == own
    written = to_released(model, january="January" in name)
    assert {key: list(weight.shape) for key, weight in written.items()} == KEYS[name]


def test_linear_weights_stored_as_convolutions():
    options, weights = released(forward_type="v05", downsample_version="v1")
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")
    stored = {name: w[:, :, None, None] if name.endswith(linear) else w for name, w in weights.items()}
    assert any(stored[name].dim() != weights[name].dim() for name in weights)
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(from_released(options, stored)(images), from_released(options, weights)(images))


def test_january_spelling_gives_the_same_model():
    options, weights = released(forward_type="v0", mlp_ratio=0.0, patchembed_version="v1", downsample_version="v1")
    model = from_released(options, weights)
    january = to_released(model, january=True)
    assert "layers.0.blocks.0.self_attention.A_logs" in january and "head.weight" in january
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(from_released(options, january)(images), model(images))
    options, weights = released()
    with pytest.raises(vmamba.UserError, match="has no name in files of January 2024"):
        to_released(from_released(options, weights), january=True)


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager"), torch.optim.swa_utils.AveragedModel]
)
def test_wrappers_go(wrap):
    options, weights = released()
    model = from_released(options, weights)
    assert to_released(wrap(model)).keys() == weights.keys()
    model.layers[0].blocks[0] = torch.compile(model.layers[0].blocks[0], backend="eager")
    assert to_released(wrap(model)).keys() == weights.keys()
    wrapped = {name: weight for name, weight in wrap(model).state_dict().items() if name != "n_averaged"}
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(from_released(options, wrapped)(images), from_released(options, weights)(images))
    backbone = vmamba.Backbone(from_released(options, weights), (0, 1))
    assert to_released(wrap(backbone)).keys() == to_released(backbone).keys()
    for other in (torch.nn.Linear(2, 2), torch.nn.DataParallel(torch.nn.Linear(2, 2)), None):
        with pytest.raises(vmamba.UserError, match="to_released takes a VSSM or a Backbone; this is a "):
            to_released(other)


def test_weights_of_january_with_what_their_constructor_took(caplog):
    """It had no option for the MLP and the downsampling, and two that it did not read."""
    options, weights = released(mlp_ratio=0.0, patchembed_version="v1", downsample_version="v1", ssm_d_state=16)
    model = from_released(options, weights)
    old = dict(dims=16, depths=[1, 1], num_classes=5, d_state=16, depths_decoder=[1, 1], dims_decoder=[32, 16])
    images = torch.randn(1, 3, 16, 16)
    caplog.set_level("INFO", logger="vmamba")
    for spelling in (weights, to_released(model, january=True)):
        assert torch.equal(from_released(old, spelling)(images), model(images))
        backbone = from_released(old | dict(type="MM_VSSM", out_indices=(0, 1)), spelling)
        assert backbone.model.layers[0].blocks[0].mlp is None
    assert "as in January 2024: {'mlp_ratio': 0.0, 'downsample_version': 'v1'}" in caplog.text
    with pytest.raises(vmamba.UserError, match="missing: layers.*.blocks.*.mlp.fc1"):  # what is given holds
        from_released(old | dict(mlp_ratio=4.0), weights)


def test_postfixes_in_any_order():
    orders = {"_".join(("v05", *order)) for order in permutations(("noz", "oact", "oncnorm", "no32"))}
    first, *others = [options_from_released(SMALL | {"forward_type": order}) for order in orders]
    assert all(other == first for other in others)
    expected = dict(gate=False, out_act=True, out_norm="ln_dwconv3", scan_float32=False)
    assert {name: first[name] for name in expected} == expected


def test_v0_ignores_what_the_released_v0_ignores():
    ignored = dict(ssm_conv=-1, ssm_conv_bias=False, ssm_act_layer="gelu", ssm_init="v2")
    assert options_from_released(ignored | {"forward_type": "v0"}) == options_from_released({"forward_type": "v0"})
    ours = options_from_released(ignored | {"forward_type": "v05"})
    assert [ours[name] for name in ("ssm_conv", "ssm_conv_bias", "ssm_act", "ssm_init")] == [-1, False, "gelu", "v2"]


@pytest.mark.parametrize(
    ("old", "later"),
    [
        ("v3noz", "v3_noz"),
        ("v05noz", "v05_noz"),
        ("v2noz", "v2_noz"),
        ("v2nozact", "v2_nozact"),
        ("v05nozoact", "v05_noz_oact"),
        ("v2softmaxnozactno32", "v2_onsoftmax_nozact_no32"),
        ("v2dwconv3", "v2_ondwconv3"),
        ("v31dnoz", "v051d_noz"),
        ("v32d", "v052d"),
        ("v4", "v05"),
        ("v1", "v2"),
    ],
)
def test_forward_types_until_spring_2024(old, later):
    assert options_from_released({"forward_type": old}) == options_from_released({"forward_type": later})


def test_which_forward_types_force_float32():
    """As the original's table of them says."""
    forced = {"v0", "v0seq", "v01", "v02", "v03", "v1", "v2"}
    free = {"v04", "v05", "v3", "v4", "v051d", "v052d", "m0", "v2_no32", "v01_no32"}
    for name in forced | free:
        assert options_from_released({"forward_type": name})["scan_float32"] is (name in forced), name


def test_what_constructors_of_other_times_take():
    old = dict(d_state=4, dt_rank="3", attn_drop_rate=0.2, drop_rate=0.0, norm_layer=torch.nn.LayerNorm)
    mmdetection = dict(type="MM_VSSM", pretrained="x.pth", init_cfg=None, out_indices=(0, 1), use_checkpoint=True)
    later = dict(ssm_d_state=4, ssm_dt_rank=3, ssm_drop_rate=0.2, norm_layer="ln2d", ssm_rank_ratio=2.0)
    assert options_from_released(old | mmdetection) == options_from_released(later)
    assert (
        options_from_released(dict(norm_layer=torch.nn.BatchNorm2d, ssm_act_layer=torch.nn.GELU))["norm_layer"] == "bn"
    )
    assert options_from_released(dict(ssm_simple_init=True))["ssm_init"] == "v1"
    options, weights = released()
    backbone = from_released(options | mmdetection, weights)
    assert isinstance(backbone, vmamba.Backbone) and backbone.out_indices == (0, 1)
    assert all(stage.grad_checkpointing for stage in backbone.model.layers)
    assert isinstance(from_released(options | mmdetection, weights, features=(1,)).outnorm1, torch.nn.LayerNorm)
    assert not from_released(options | {"use_checkpoint": False}, weights).layers[0].grad_checkpointing
    with pytest.raises(vmamba.UserError, match="drop_rate is 0.1; dropout behind the stem is not here"):
        options_from_released(dict(drop_rate=0.1))


def test_weights_of_an_out_norm_of_spring_2024():
    options, weights = released(forward_type="v2_ondwconv3")
    old = {name.replace("out_norm.1.", "out_norm."): weight for name, weight in weights.items()}
    assert old.keys() != weights.keys()
    images = torch.randn(1, 3, 16, 16)
    expected = from_released(options, weights)(images)
    assert torch.equal(from_released(options | {"forward_type": "v2dwconv3"}, old)(images), expected)


@pytest.mark.parametrize("forward_type", ["v01", "v02", "v03", "v04", "v05", "v2", "v3", "v0seq", "v051d", "v052d"])
def test_forward_types_that_are_one_model(forward_type):
    options, weights = released(forward_type="v05", ssm_conv=3)
    if forward_type == "v0seq":  # as v0, always with the convolution's bias
        options, weights = released(forward_type="v0")
    images = torch.randn(2, 3, 16, 24)
    same = torch.allclose(
        from_released(options | {"forward_type": forward_type}, weights)(images),
        from_released(options, weights)(images),
        rtol=1e-5,
    )
    assert same == (forward_type not in ("v051d", "v052d"))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(forward_type="v052dc"), "'v052dc' is an ablation of the original that is not supported"),
        (dict(forward_type="xv1a"), "'xv1a' is an ablation of the original that is not supported"),
        (dict(forward_type="xv2noz"), "'xv2noz' is an ablation of the original that is not supported"),
        (dict(forward_type="v32dc"), "'v32dc' is an ablation of the original that is not supported"),
        (dict(forward_type=3), "forward_type is 3; expected a string such as 'v05_noz'"),
        (dict(ssm_d_state=0), "ssm_d_state is 0; it must be between 1 and 4096"),
        (dict(forward_type="v9"), "unknown forward_type 'v9'"),
        (dict(forward_type="v05_noz_onsofmax"), "unknown postfix 'onsofmax'; did you mean 'onsoftmax'?"),
        (dict(forward_type="v05_onnone_onsigmoid"), "names 2 out-norms"),
        (dict(forward_type="v0_noz"), "'v0' takes no postfix"),
        (dict(ssm_dstate=3), "unknown released option 'ssm_dstate'; did you mean 'ssm_d_state'?"),
        (dict(norm_layer="gn"), "unknown released norm_layer 'gn'"),
        (dict(downsample_version="v9"), "unknown downsample_version 'v9'"),
        (dict(d_state=4), "released options d_state and ssm_d_state are names of one; give one of them"),
        (dict(use_checkpoint="x"), "use_checkpoint is 'x' (str); expected true or false"),
        ({3: 4}, "released option 3 is no name but a int"),
    ],
)
def test_unknown_options_are_named(options, words):
    with pytest.raises(vmamba.UserError) as error:
        from_released(SMALL | options, {})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "weights", "words"),
    [
        (SMALL, "weights.pth", r"state_dict is 'weights\.pth'; expected a mapping \(vmamba\.load_checkpoint\(path\)"),
        (SMALL, {"model": {}}, "state_dict holds 'model', a dict and no tensor"),
        (SMALL, {3: torch.ones(1)}, "state_dict holds the name 3, a int"),
        ("tiny", {}, "options is 'tiny'; expected a mapping"),
    ],
)
def test_what_is_no_state_dict_is_said(options, weights, words):
    with pytest.raises(vmamba.UserError, match=words):
        from_released(options, weights)


def test_weights_that_do_not_fit_are_listed_in_groups_and_nothing_loads():
    options, weights = released(forward_type="v05_noz", depths=[2, 2])
    wrong = {name: weight for name, weight in weights.items() if "fc1" not in name} | {"neck.weight": torch.zeros(1)}
    with pytest.raises(vmamba.UserError) as error:
        from_released(options | {"ssm_d_state": 4}, wrong)
    text = str(error.value)
    assert "8 missing: layers.*.blocks.*.mlp.fc1.bias (4 keys), layers.*.blocks.*.mlp.fc1.weight (4 keys)" in text
    assert "1 unexpected: neck.weight" in text
    assert "8 of another shape: layers.0.blocks.*.op.A_logs (2 keys): file (128, 1), model (128, 4)" in text


def test_position_maps_that_are_none():
    options, weights = released(posembed=True, imgsize=32)
    for wrong in (torch.ones(3), weights["pos_embed"].to_sparse(), weights["pos_embed"][..., :0]):
        with pytest.raises(vmamba.UserError, match="1 of another (shape|kind): pos_embed: "):
            from_released(options, weights | {"pos_embed": wrong})


def test_position_map_of_another_image_size():
    options, weights = released(posembed=True, imgsize=32)
    larger = from_released(options | {"imgsize": 48}, weights)
    assert larger.pos_embed.shape == (1, 16, 12, 12)
    expected = torch.nn.functional.interpolate(weights["pos_embed"], (12, 12), mode="bicubic", align_corners=False)
    torch.testing.assert_close(larger.pos_embed, expected)
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(larger(images), from_released(options, weights)(images))


def test_the_released_backbone_leaves_the_position_map_out():
    options, weights = released(posembed=True, imgsize=32)
    images = torch.randn(1, 3, 32, 32)
    without = {name: weight for name, weight in weights.items() if name != "pos_embed"}
    expected = from_released(options | {"posembed": False}, without, features=(0, 1))(images)
    torch.testing.assert_close(from_released(options, weights, features=(0, 1))(images), expected)


def test_backbone_without_released_norms_and_its_errors():
    options, weights = released()
    backbone = from_released(options, weights, features=(1,))
    (features,) = backbone(torch.randn(2, 3, 16, 24))
    assert features.shape == (2, 32, 2, 3) and backbone.channels == [32] and backbone.strides == [8]
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 2, 3), rtol=0, atol=1e-5)
    with pytest.raises(vmamba.UserError, match="stage 2 does not exist; the model's stages are 0 to 1"):
        from_released(options, weights, features=(2,))
    with pytest.raises(vmamba.UserError, match="2 missing: outnorm1.bias, outnorm1.weight"):
        from_released(options, weights | {"outnorm0.weight": torch.ones(16), "outnorm0.bias": torch.zeros(16)}, (0, 1))
