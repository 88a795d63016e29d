"""Options of a model: typed, bounded and named the same for Python, configs and files of the original."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
import timm
import torch

import vmamba
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models.options import CONFIGURABLE, ModelOptions, ScanOptions, check_configured
from vmamba.models.ss2d import SS2D, SSD2D
from vmamba.models.variants import VARIANTS, build_model

WRONG = [
    ("gate", "maybe", "gate is 'maybe' (str); expected true or false"),
    ("gate", 1, "gate is 1 (int); expected true or false"),
    ("d_state", 0, "d_state is 0; it must be between 1 and 4096"),
    ("d_state", -1, "d_state is -1; it must be between 1 and 4096"),
    ("d_state", 1.5, "d_state is 1.5 (float); expected an integer"),
    ("ssm_ratio", "x", "ssm_ratio is 'x' (str); expected a number"),
    ("ssm_ratio", 0, "ssm_ratio is 0.0; it must be above 0"),
    ("ssm_ratio", 0.001, "ssm_ratio is 0.001, which of 16 channels leaves none"),
    ("dt_rank", "autom", "unknown dt_rank 'autom'; did you mean 'auto'?"),
    ("dt_rank", 0, "dt_rank is 0; it must be between 1 and 4096"),
    ("routes", ["row", "cols"], "unknown routes 'cols'; did you mean 'col'?"),
    ("routes", [], "routes is empty; give at least one of row, col"),
    ("ssm_conv", 4, "ssm_conv is 4; the convolution keeps the image's size, so choose an odd side"),
    ("ssm_drop_rate", 2, "ssm_drop_rate is 2.0; it must be between 0 and 1"),
    ("out_norm", "softmx", "unknown out_norm 'softmx'; did you mean 'softmax'?"),
    ("mlp_ratio", None, "mlp_ratio is None (NoneType); expected a number"),
    ("mlp_ratio", 0.001, "mlp_ratio is 0.001, which of 16 channels leaves none"),
    ("patch_size", 0, "patch_size is 0; it must be between 1 and 1024"),
    ("depths", 3, "depths is 3 (int); expected a list of integers"),
    ("depths", [2], "dims has 2 stages and depths 1"),
    ("dims", [16, 0], "dims is [16, 0]; it must be between 1 and 16384"),
    ("norm_layer", True, "norm_layer is True (bool); expected a string"),
    ("d_sate", 3, "unknown model option 'd_sate'; did you mean 'd_state'?"),
    ("act", "gelu", "unknown model option 'act'; did you mean"),
]
SMALL = dict(dims=[16, 32], depths=[1, 1])


def config(*opts):
    small = ["MODEL.OPTIONS.dims", "[16, 32]", "MODEL.OPTIONS.depths", "[1, 1]"]
    return get_config(None, [*small, *opts])


def sentence(function, *args, **options):
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_what_a_mistake_says_wherever_it_is_made(name, value, words):
    assert words in sentence(vmamba.VSSM, **SMALL | {name: value})
    assert words in sentence(vmamba.create_model, "vmamba_tiny", **SMALL | {name: value})
    if name in {each.name for each in fields(ScanOptions)} | {"d_sate", "act"}:
        assert words in sentence(SS2D, 16, **{name: value}) and words in sentence(SSD2D, 16, **{name: value})
    if value is not None:  # which timm drops
        assert words in sentence(timm.create_model, "vmamba_tiny", **SMALL | {name: value})
        said = sentence(lambda: build_model(config(f"MODEL.OPTIONS.{name}", value)))
        assert words in said.replace("MODEL.OPTIONS.", "")


@pytest.mark.parametrize("each", fields(ModelOptions), ids=lambda each: each.name)
def test_every_number_has_an_upper_bound(each):
    """Far below what would ask for all memory there is."""
    takes = each.metadata["takes"]
    if {int, float} & {kind[0] if isinstance(kind, list) else kind for kind in takes.kinds}:
        huge = [99999999999] if takes.kinds == ([int],) else 99999999999
        assert takes.at_most <= 10**6 and f" {takes.at_most}" in sentence(vmamba.VSSM, **{each.name: huge})


@pytest.mark.parametrize("each", fields(ModelOptions), ids=lambda each: each.name)
def test_every_option_is_checked(each):
    assert sentence(vmamba.VSSM, **{each.name: object()}).startswith(f"{each.name} is <object")
    assert each.metadata["takes"].check(each.name, each.default) is not None and each.metadata["meaning"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(patch_embed="v2", patch_size=8), "patch_size is 8; patch_embed 'v2' has stride 4, so choose that or"),
        (dict(patch_embed="v2", patch_size=2), "patch_size is 2; patch_embed 'v2' has stride 4, so choose that or"),
        (dict(patch_embed="v2", dims=1), "dims starts with 1; patch_embed 'v2' halves it"),
        (dict(pos_embed=True, img_size=3), "img_size is 3; pos_embed needs at least one patch of 4 x 4"),
        (dict(img_size=(3, 4, 5)), "img_size is [3, 4, 5]; expected 2 values"),
        (dict(dims=96, depths=(1,) * 40), "it must be between 1 and 16384"),
        (dict(dt_rank="4"), "dt_rank is '4' (str); expected an integer, so write it without quotes"),
        (dict(scan="ssd", dt_rank=5), "do not divide among 5 heads"),
        (dict(backend="cudda"), "unknown backend 'cudda'; did you mean 'cuda'?"),
        (dict(drop_path_rate=None), "drop_path_rate is None"),
        (dict(depths=(), dims=()), "dims has 0 stages"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    assert words in sentence(vmamba.VSSM, **dict(depths=(1,), dims=8) | options)
    assert "unknown backend 'cudda'" in sentence(vmamba.VSSM(depths=(1,), dims=8).set_backend, "cudda")


def test_numbers_and_lists_of_any_kind_are_taken():
    model = vmamba.VSSM(
        dims=[np.int64(16), 32],
        depths=(1, 1),
        ssm_ratio=1,
        gate=np.bool_(False),
        ssm_act=np.str_("gelu"),
        d_state=np.int32(4),
        routes="row",
        mlp_ratio=0,
    )
    mixer = model.layers[0].blocks[0].op
    assert (mixer.d_inner, mixer.d_state, mixer.routes, model.dims) == (16, 4, ("row",), [16, 32])
    assert ModelOptions(depths=[1, 2]) == ModelOptions(depths=(1, 2)) and hash(ModelOptions(depths=[1, 2]))
    assert SS2D(16, ModelOptions(d_state=3), d_state=4).d_state == 4


def test_what_a_config_may_set():
    elsewhere = {"num_classes", "in_chans", "img_size", "drop_path_rate", "backend", "global_pool"}
    assert CONFIGURABLE.keys() == {each.name for each in fields(ModelOptions)} - elsewhere
    assert CONFIGURABLE["d_state"][:2] == (16, "states of a channel")
    assert check_configured("depths", (1, 2)) == [1, 2]
    said = sentence(lambda: build_model(config("MODEL.OPTIONS.num_classes", "5")))
    assert said == "--opts: MODEL.OPTIONS.num_classes has a key of its own; set MODEL.NUM_CLASSES"
    model = build_model(
        config("MODEL.OPTIONS.routes", "row", "MODEL.OPTIONS.ssm_ratio", "1", "MODEL.OPTIONS.gate", "no")
    )
    mixer = model.layers[0].blocks[0].op
    assert (mixer.routes, mixer.d_inner, mixer.gate) == (("row",), 16, False)


def test_without_a_drop_path_rate_of_its_own_a_config_has_the_variants():
    settings = config("MODEL.NAME", "vmamba_base")
    settings.defrost()
    settings.MODEL.DROP_PATH_RATE = None
    blocks = build_model(settings).layers[-1].blocks
    assert blocks[-1].drop_path.drop_prob == VARIANTS["vmamba_base"].options["drop_path_rate"] == 0.6


def test_the_constructors_signature_lists_the_options():
    shown = inspect.signature(vmamba.VSSM).parameters
    assert {name: each.default for name, each in shown.items()} == {e.name: e.default for e in fields(ModelOptions)}
    assert vmamba.VSSM(3, 1, **SMALL)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    assert [*inspect.signature(SS2D).parameters][2:] == [each.name for each in fields(ScanOptions)]
