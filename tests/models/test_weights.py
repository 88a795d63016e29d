"""Weights that do not fit a model: other numbers, channels, heads, sizes."""

from pathlib import Path

import pytest
import timm
import torch

import vmamba
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models.backbones import create_backbone
from vmamba.models.pretrained import Checkpoint, load_pretrained, open_checkpoint
from vmamba.models.variants import build_model
from vmamba.models.vssm import resize_pos_embed

from .small import SMALL, model, same


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.to_sparse(), r"file torch\.sparse_coo, model float32"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "file quantized, model float32"),
        (lambda w: w.to("meta"), "file on the meta device, model float32"),
        (lambda w: w.mul(10).to(torch.int8), "file int8, model float32"),
        (lambda w: w.to(torch.complex64), "file complex64, model float32"),
        (lambda w: torch.nested.nested_tensor([w, w]), "file nested, model float32"),
        (lambda w: w.double() + 1e300, "file float64 with numbers that float32 cannot hold"),
    ],
    ids=["sparse", "quantized", "meta", "integer", "complex", "nested", "large"],
)
@pytest.mark.filterwarnings("ignore")
def test_numbers_of_another_kind_are_refused(plain, change, words):
    weights = dict(plain) | {name: change(plain[name]) for name in ("patch_embed.0.weight", "classifier.norm.bias")}
    target = model(3, in_chans=1)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    with pytest.raises(UserError, match=rf"w\.pth' .*of another kind: classifier\.norm\.bias: {words}"):
        load_pretrained(target, Checkpoint(Path("w.pth"), "", weights, {}, {}))
    assert same(target.state_dict(), before)


def test_timm_takes_no_numbers_that_become_infinite(plain):
    for name in ("classifier.head.weight", "layers.0.blocks.0.norm.bias", "patch_embed.0.weight"):
        weights = dict(plain) | {name: plain[name].double() + 1e300}
        overlay = dict(state_dict=weights, num_classes=5)
        with pytest.raises(UserError, match=f"{name}: file float64 with numbers that float32 cannot hold"):
            timm.create_model("vmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)


@pytest.mark.filterwarnings("ignore")
def test_other_widths_are_taken_and_a_model_without_numbers_is_not_filled(plain):
    half = {name: weight.half() for name, weight in plain.items()}
    target = model(3)
    load_pretrained(target, Checkpoint(Path("w.pth"), "", half, {}, {}))
    assert all(torch.equal(weight, half[name].float()) for name, weight in target.state_dict().items())
    with pytest.raises(UserError, match="the model is on the meta device, which holds no numbers"):
        load_pretrained(model(3).to("meta"), Checkpoint(Path("w.pth"), "", plain, {}, {}))


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_another_number_of_channels_is_adapted_as_timm_does(released, averaged, said, channels):
    target = model(3, in_chans=channels)
    load_pretrained(target, vmamba.load_checkpoint(released))
    timms = timm.create_model(
        "vmamba_tiny",
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=averaged, num_classes=5),
        **SMALL | dict(in_chans=channels),
    )
    assert same(target.state_dict(), timms.state_dict())
    assert f"adapted the first convolution from 3 channels of the images to {channels}" in said()
    backbone = vmamba.Backbone(model(3, in_chans=channels), (0, 1))
    load_pretrained(backbone, vmamba.load_checkpoint(released))
    assert torch.equal(backbone.model.patch_embed[0].weight, target.patch_embed[0].weight)
    gray = Checkpoint(Path("gray.pth"), "", target.state_dict(), {}, {})
    with pytest.raises(UserError, match=rf"patch_embed\.0\.weight: file \(8, {channels}, 4, 4\), model \(8, 2, 4, 4\)"):
        load_pretrained(model(in_chans=2), gray)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channels_of_a_model_of_timm_are_as_timm_adapts_them(channels, tmp_path):
    """As a classifier and as a backbone; `convnext_atto`'s first convolution is not called as ours."""
    torch.save(timm.create_model("convnext_atto", num_classes=5).state_dict(), tmp_path / "rgb.pth")
    peer = timm.create_model(
        "convnext_atto",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "rgb.pth"), num_classes=5),
        num_classes=5,
        in_chans=channels,
    )
    config = get_config(None, ["MODEL.NAME", "timm/convnext_atto", "MODEL.NUM_CLASSES", 5, "MODEL.IN_CHANS", channels])
    ours = build_model(config)
    load_pretrained(ours, open_checkpoint(tmp_path / "rgb.pth"))
    assert same(ours.state_dict(), peer.state_dict())
    backbone = create_backbone("timm/convnext_atto", in_chans=channels, num_classes=5)
    backbone.start_from(open_checkpoint(tmp_path / "rgb.pth"))
    assert torch.equal(backbone.model.model.state_dict()["stem.0.weight"], peer.state_dict()["stem.0.weight"])


def test_a_mismatch_is_listed_in_groups_and_loads_nothing(released):
    target = model(2, d_state=1, mlp_ratio=4.0)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    with pytest.raises(UserError, match=r"released\.pth' is of another architecture") as error:
        load_pretrained(target, vmamba.load_checkpoint(released))
    for part in (
        "18 missing: layers.*.blocks.*.mlp.fc1.bias (3 keys), ",
        "layers.1.blocks.*.op.A_logs (2 keys): file (128, 16), model (128, 1)",
        "layers.0.blocks.0.op.A_logs: file (64, 16), model (64, 1)",
    ):
        assert part in str(error.value)
    assert same(target.state_dict(), before)


def test_a_head_is_dropped_only_when_asked_for(released, averaged, said):
    checkpoint = vmamba.load_checkpoint(released)
    target = model(2, num_classes=7)
    with pytest.raises(UserError, match=r"head\.weight: file \(5, 16\), model \(7, 16\); for a new.*7.*5.*--drop-head"):
        load_pretrained(target, checkpoint)
    load_pretrained(target, checkpoint, drop_head=True)
    assert "dropped the head of 5 classes; the model's head of 7 classes starts at random" in said()
    fresh = {name: weight for name, weight in model(2, num_classes=7).state_dict().items() if ".head." in name}
    assert same(target.state_dict(), averaged | fresh)
    with pytest.raises(UserError, match="of another architecture"):  # the head, and nothing else
        load_pretrained(model(2, num_classes=7, dims=16), checkpoint, drop_head=True)


def test_a_position_map_is_resized(tmp_path, said):
    small = model(pos_embed=True)
    torch.save({"model": small.state_dict()}, tmp_path / "small.pth")
    large = model(1, pos_embed=True, img_size=(48, 64))
    load_pretrained(large, vmamba.load_checkpoint(tmp_path / "small.pth"))
    assert torch.equal(large.pos_embed, resize_pos_embed(small.pos_embed, (12, 16)))
    assert "resized the position map from (8, 8) to (12, 16)" in said()
