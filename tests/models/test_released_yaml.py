"""The original's YAML files of three times: the keys tell the time, the time the defaults."""

import pytest
import torch

from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models.variants import VARIANTS, build_model

LATER = "SSM_D_STATE: 1, SSM_CONV_BIAS: false, SSM_FORWARDTYPE: v3noz, DOWNSAMPLE: v3, PATCHEMBED: v2"
JANUARY = "SSM_DT_RANK: auto, SSM_RATIO: 2.0, MLP_RATIO: 0.0, DOWNSAMPLE: v1"


def read(tmp_path, vssm, more=""):
    path = tmp_path / "x.yaml"
    path.write_text(f"MODEL: {{TYPE: vssm, NAME: its_name, {more} VSSM: {{{vssm}}}}}")
    return get_config(path)


def parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


@pytest.mark.parametrize(
    ("vssm", "name", "time"),
    [
        ("EMBED_DIM: 96, DEPTHS: [2, 2, 9, 2]", "vmamba_tiny", "of its first weeks"),  # the first of all
        ("EMBED_DIM: 128, DEPTHS: [2, 2, 27, 2]", "vmamba_base", "of its first weeks"),
        ("EMBED_DIM: 96, DEPTHS: [2, 2, 9, 2], MLP_RATIO: 4.0, PATCH_NORM: true", "vmamba_tiny", "of its first weeks"),
        (f"EMBED_DIM: 96, DEPTHS: [2, 2, 9, 2], SSM_D_STATE: 16, {JANUARY}", "vmamba_tiny", "of late January"),
        (
            "EMBED_DIM: 96, DEPTHS: [2, 2, 27, 2], D_STATE: 16, DT_RANK: auto, SSM_RATIO: 2.0, MLP_RATIO: 0.0, "
            "DOWNSAMPLE: v1, SHARED_SSM: false",
            "vmamba_small",
            "of late January",
        ),
        (f"EMBED_DIM: 96, DEPTHS: [2, 2, 9, 2], {JANUARY}, PATCHEMBED: v1", "vmamba_tiny", "of February 2024 or later"),
        (f"EMBED_DIM: 96, DEPTHS: [2, 2, 5, 2], {LATER}", "vmamba_tiny_s2l5", "of February 2024 or later"),
    ],
)
def test_a_file_of_each_time_is_its_model(tmp_path, caplog, vssm, name, time):
    config = read(tmp_path, vssm, "DROP_PATH_RATE: 0.3,")
    assert name == config.MODEL.NAME and config.MODEL.DROP_PATH_RATE == 0.3
    in_float32 = {} if "SSM_FORWARDTYPE" in vssm else {"scan_float32": True}  # v0, then v2, where none is named
    assert in_float32 == config.MODEL.OPTIONS
    assert ("scan_float32: true" in caplog.text) == bool(in_float32)
    assert parameters(config) == VARIANTS[name].parameters
    assert f"is a config of the original {time}" in caplog.text
    assert ("MLP_RATIO" in caplog.text) == ("PATCH_NORM" in vssm)  # named where it says nothing


def test_defaults_of_each_time(tmp_path):
    """One key each that the time before had not, and what is left out."""
    second = read(tmp_path, "EMBED_DIM: 96, DEPTHS: [2, 2], DT_RANK: 4")
    model = build_model(second)
    block = model.layers[0].blocks[0]
    assert (block.op.dt_rank, block.mlp.fc1.out_features, len(model.patch_embed)) == (4, 384, 3)
    assert model.layers[0].downsample[1].kernel_size == (2, 2)
    third = build_model(read(tmp_path, "EMBED_DIM: 96, DEPTHS: [2, 2], SSM_CONV: 5"))
    assert third.layers[0].blocks[0].op.conv2d.kernel_size == (5, 5) and len(third.patch_embed) == 8


@pytest.mark.parametrize(
    ("vssm", "in_float32"),
    [
        ("DEPTHS: [2, 2, 9, 2]", True),
        ("DEPTHS: [2, 2, 2, 2]", True),
        (f"DEPTHS: [2, 2, 9, 2], {JANUARY}, PATCHEMBED: v1, SSM_FORWARDTYPE: v0", True),
        (f"DEPTHS: [2, 2, 9, 2], {JANUARY}, PATCHEMBED: v1, SSM_FORWARDTYPE: v05", False),
        (f"DEPTHS: [2, 2, 5, 2], {LATER}", False),
    ],
)
def test_the_scans_dtype_is_the_originals_of_a_named_variant_and_of_any_other(tmp_path, vssm, in_float32):
    model = build_model(read(tmp_path, f"EMBED_DIM: 16, {vssm}"))
    assert model.layers[0].blocks[0].op.scan_float32 is in_float32
    assert read(tmp_path, f"EMBED_DIM: 96, {vssm}").MODEL.OPTIONS.get("scan_float32", False) is in_float32


@pytest.mark.parametrize(
    ("vssm", "averages"),
    [
        ("EMBED_DIM: 96, DEPTHS: [2, 2, 9, 2]", False),  # whose released run kept no averaged weights
        ("EMBED_DIM: 96, DEPTHS: [2, 2, 2, 2]", True),  # only near it
        ("EMBED_DIM: 64, DEPTHS: [2, 2, 9, 2]", True),
        ("EMBED_DIM: 96, DEPTHS: [2, 2, 27, 2]", True),
    ],
)
def test_weights_are_averaged_as_in_the_original_but_for_its_first_model(tmp_path, vssm, averages):
    assert read(tmp_path, vssm).TRAIN.EMA.ENABLE is averages


def test_mamba_unets_file_and_the_originals_drop_path(tmp_path):
    config = read(tmp_path, "EMBED_DIM: 96, DEPTHS: [2, 2, 2, 2]", "PRETRAIN_CKPT: vmamba_tiny_e292.pth,")
    assert config.MODEL.NAME == "vmamba_tiny"
    assert config.MODEL.OPTIONS == {"depths": [2, 2, 2, 2], "scan_float32": True}  # as v0 scanned
    assert config.MODEL.PRETRAINED == "vmamba_tiny_e292.pth" and config.MODEL.DROP_PATH_RATE == 0.1


@pytest.mark.parametrize(
    ("vssm", "words"),
    [
        ("D_STATE: 16, SHARED_SSM: true", "x.yaml: MODEL.VSSM.SHARED_SSM is an ablation of the original"),
        ("D_STATE: 0", "x.yaml: ssm_d_state is 0; it must be between 1 and 4096"),
        ("SSM_DT_RANK: many", "x.yaml: unknown ssm_dt_rank 'many'"),
        ("SSM_FORWARDTYPE: xv2noz", "x.yaml: forward_type 'xv2noz' is an ablation"),
    ],
)
def test_what_is_not_here_is_said(tmp_path, vssm, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, vssm)
