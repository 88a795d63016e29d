"""Mamba's layer against a computation by hand, position by position; and Vim, which stacks it."""

import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import torch.nn.functional as F

from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models import Mamba1D, mamba1d
from vmamba.models.backbones import create_backbone
from vmamba.models.flops import complexity
from vmamba.models.variants import build_model
from vmamba.models.vim import Vim

NAMES = {
    "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias",
    "out_proj.weight",
}  # fmt: skip
FROM_THE_END = {
    "A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias",
}  # fmt: skip


def layer(**options):
    torch.manual_seed(0)
    return Mamba1D(**dict(d_model=6, d_state=3, d_conv=4) | options).double()


def direction(w, x, z, end, states):
    """One direction of mamba_ssm's layer, (batch, channels, length), by loops."""
    A = -w["A_b_log" if end else "A_log"].exp()
    kernel, bias = w[f"conv1d{end}.weight"][:, 0], w[f"conv1d{end}.bias"]
    rank, length = w[f"dt_proj{end}.weight"].shape[1], x.shape[2]
    padded, h, out = F.pad(x, (kernel.shape[1] - 1, 0)), 0, []
    for t in range(length):
        u = F.silu((padded[..., t : t + kernel.shape[1]] * kernel).sum(-1) + bias)  # (batch, channels)
        dt, B, C = (u @ w[f"x_proj{end}.weight"].T).split((rank, states, states), -1)
        step = F.softplus(dt @ w[f"dt_proj{end}.weight"].T + w[f"dt_proj{end}.bias"])
        h = torch.exp(step[..., None] * A) * h + (step * u)[..., None] * B[:, None]
        out.append(((h * C[:, None]).sum(-1) + w[f"D{end}"] * u) * F.silu(z[..., t]))
    return torch.stack(out, -1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("divide", [False, True])
def test_agrees_with_a_computation_by_hand(bidirectional, divide):
    mamba = layer(bidirectional=bidirectional, divide=divide)
    w = dict(mamba.named_parameters())
    assert w.keys() == (NAMES | FROM_THE_END if bidirectional else NAMES)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    inner, z = (x @ w["in_proj.weight"].T).transpose(1, 2).chunk(2, 1)
    y = direction(w, inner, z, "", 3)
    if bidirectional:
        y = (y + direction(w, inner.flip(2), z.flip(2), "_b", 3).flip(2)) / (2 if divide else 1)
    expected = y.transpose(1, 2) @ w["out_proj.weight"].T
    torch.testing.assert_close(mamba(x), expected)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), list(w.values()))
    for grad, want in zip(torch.autograd.grad((mamba(x) * weight).sum(), list(w.values())), wanted, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("options", [{}, dict(d_conv=1, conv_bias=False), dict(dt_rank=2, expand=1, bias=True)])
def test_steps_are_what_the_whole_gives(options):
    mamba, x = layer(**options), torch.randn(3, 7, 6, dtype=torch.float64)
    state = mamba.make_state(3)
    steps = [mamba.step(x[:, t], state) for t in range(7)]
    torch.testing.assert_close(torch.stack(steps, 1), mamba(x))


def test_a_backend_that_is_not_there_is_said_when_the_layer_is_made(tmp_path, monkeypatch):
    words = "is mamba_ssm, which cannot be used: the package mamba_ssm is not installed .*; choose auto"
    with pytest.raises(UserError, match=f"^scan_backend {words}"):
        layer(scan_backend="mamba_ssm")
    made = layer()
    with pytest.raises(UserError, match=f"^backend {words}"):
        made.set_backend("mamba_ssm")
    assert made.scan_backend == "auto" and layer(scan_backend="reference")
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="mamba_ssm is installed but cannot be imported: undefined symbol; choose auto"):
        layer(scan_backend="mamba_ssm")

    def absent(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr("vmamba_kernels.registry.load", absent)
    with pytest.raises(
        UserError, match="triton, which cannot be used: it cannot be imported .No module named 'triton'"
    ):
        layer(scan_backend="triton")


def test_the_packages_serve_where_they_are(monkeypatch):
    """By stand-ins of their interfaces: causal_conv1d for the convolution, mamba_ssm for the scan."""
    with pytest.raises(UserError, match="causal_conv1d, which is not installed"):
        layer(conv_backend="causal_conv1d")
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected, calls, package = layer()(x), [], ModuleType("causal_conv1d")

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        calls.append(activation)
        out = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight))
        return F.silu(out)

    package.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    monkeypatch.setattr(mamba1d, "find_spec", lambda name: object())
    monkeypatch.setattr(mamba1d, "why_no_causal_conv1d", mamba1d.why_no_causal_conv1d.__wrapped__)  # not what it found
    torch.testing.assert_close(layer(conv_backend="causal_conv1d")(x), expected)
    torch.testing.assert_close(layer()(x), expected)
    assert calls == ["silu"]  # on a CPU not by itself


@pytest.mark.parametrize(
    "text", ["raise ImportError('undefined symbol: _ZN3c104cuda\\nand more')", "", "import no_such"]
)
def test_a_broken_causal_conv1d_is_one_sentence_and_by_itself_pytorchs(tmp_path, monkeypatch, caplog, text):
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    monkeypatch.setattr(mamba1d, "why_no_causal_conv1d", cache(mamba1d.why_no_causal_conv1d.__wrapped__))
    with pytest.raises(
        UserError, match=r"^conv_backend is causal_conv1d, which is installed but cannot be imported \("
    ):
        layer(conv_backend="causal_conv1d")
    assert layer().conv_backend == "torch" and layer(conv_backend="torch")
    (record,) = caplog.records
    assert "the convolutions are PyTorch's; install it anew, or remove it" in record.getMessage()
    assert "\n" not in record.getMessage()
    sys.modules.pop("causal_conv1d", None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(conv_backend="cudnn"), "unknown conv_backend 'cudnn'; known: auto, causal_conv1d, torch"),
        (dict(scan_backend="cude"), "unknown scan_backend 'cude'; did you mean 'cuda'"),
        (dict(d_state=0), "d_state is 0; it must be between 1 and"),
        (dict(d_state="16"), "d_state is '16' .str.; expected an integer"),
        (dict(d_conv=None), "d_conv is None .NoneType.; expected an integer"),
        (dict(dt_rank="x"), "unknown dt_rank 'x'; known: auto"),
        (dict(expand=float("nan")), "expand is nan .float.; expected a finite number"),
        (dict(expand=0.01), "expand is 0.01, which of 6 channels leaves none; choose a larger one"),
        (dict(bias="no"), "bias is 'no' .str.; expected true or false"),
    ],
)
def test_mistakes_are_sentences(options, sentence):
    with pytest.raises(UserError, match=sentence):
        layer(**options)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (lambda x: None, "is a NoneType; it must be a tensor"),
        (lambda x: x.numpy(), "is a ndarray; it must be a tensor"),
        (lambda x: x.long(), "is of torch.int64, and the layer's weights of torch.float64; give it in theirs"),
        (lambda x: x.float(), "is of torch.float32, and the layer's weights of torch.float64; give it in theirs"),
        (lambda x: x.cfloat(), "is of torch.complex64, and"),
    ],
)
def test_what_is_no_tensor_of_the_weights_numbers_is_named(given, sentence):
    mamba, x = layer(), torch.zeros(2, 9, 6, dtype=torch.float64)
    with pytest.raises(UserError, match=f"^the sequence {sentence}"):
        mamba(given(x))
    with pytest.raises(UserError, match=f"^the position {sentence}"):
        mamba.step(given(x[:, 0]), mamba.make_state(2))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=f"^the sequence {sentence}"):
        mamba(given(x))
    with pytest.raises(UserError, match="images are a NoneType; this model takes"):
        timm.create_model("vim_tiny_patch16_224", img_size=16, depth=1, embed_dim=16)(None)


def test_autocast_takes_what_it_casts():
    mamba, x = layer().float(), torch.randn(2, 9, 6)
    expected = mamba(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mamba(x.bfloat16()).float(), expected, rtol=0.1, atol=0.05)


def test_states_of_other_numbers_or_in_one_place_are_named():
    mamba, x = layer(), torch.zeros(2, 6, dtype=torch.float64)
    state = mamba.make_state(2)
    for inputs, scan in (
        (state.inputs[:1].expand_as(state.inputs), state.scan),
        (state.inputs, state.scan.as_strided(state.scan.shape, (1, 1, 1))),
        (state.inputs.long(), state.scan),
        (state.inputs, state.scan.to("meta")),
    ):
        with pytest.raises(UserError, match=r"the state has a part of .*: take it from make_state\(2\)"):
            mamba.step(x, mamba1d.MambaState(inputs, scan))
    assert not any(part.any() for part in state)


def test_sequences_and_states_that_do_not_fit_are_named():
    mamba, x = layer(), torch.zeros(2, 6, dtype=torch.float64)
    with pytest.raises(UserError, match=r"the sequence has shape \(2, 6, 9\); it must be \(batch, length, 6\)"):
        mamba(torch.zeros(2, 6, 9, dtype=torch.float64))
    with pytest.raises(UserError, match=r"the sequence has shape \(2, 0, 6\), which has no position; give one or more"):
        mamba(torch.zeros(2, 0, 6, dtype=torch.float64))
    for state in (None, mamba.make_state(2).scan, [mamba.make_state(2)]):
        with pytest.raises(
            UserError, match=r"the state is a (NoneType|Tensor|list) and no MambaState; take it from make_state\(2\)"
        ):
            mamba.step(x, state)
    with pytest.raises(UserError, match=r"the position has shape \(2, 5\); it must be \(batch, 6\)"):
        mamba.step(x[:, :5], mamba.make_state(2))
    for state in (mamba.make_state(3), layer(d_state=4).make_state(2)):
        with pytest.raises(UserError, match=r"which are not of this layer and 2 sequences; take it from make_state\(2"):
            mamba.step(x, state)
    with pytest.raises(UserError, match="there is no step of it"):
        layer(bidirectional=True).step(x, mamba.make_state(2))


def tiny_vim(**options):
    torch.manual_seed(0)
    return Vim(**dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5) | options)


def test_vim_has_the_published_size_and_names():
    model = timm.create_model("vim_tiny_patch16_224")
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_148_008  # 7M in arXiv 2401.09417, table 1
    names = {name for name in model.state_dict() if not name.startswith("layers.")}
    assert names == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm_f.weight", "head.weight",
        "head.bias",
    }  # fmt: skip
    assert {name[9:] for name in model.state_dict() if name.startswith("layers.0.")} == {
        "norm.weight", *(f"mixer.{name}" for name in NAMES | FROM_THE_END)
    }  # fmt: skip


def test_vim_by_hand():
    model, x = tiny_vim().eval(), torch.randn(2, 3, 32, 32)
    patches = model.patch_embed.proj(x).flatten(2).mT  # (2, 16, 16)
    h = torch.cat([patches[:, :8], model.cls_token.expand(2, -1, -1), patches[:, 8:]], 1) + model.pos_embed
    for each in model.layers:
        h = h + each.mixer(h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * each.norm.weight)
    h = h[:, 8]
    h = h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * model.norm_f.weight
    torch.testing.assert_close(model(x), model.head(h))


def test_vim_trains_checkpointed_and_takes_weights_of_another_size(tmp_path):
    model, x = tiny_vim(drop_path_rate=0.2).train(), torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    torch.save({"model": model.state_dict()}, tmp_path / "vim.pth")
    small = dict(patch_size=8, embed_dim=16, depth=2, num_classes=5)
    file = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "vim.pth"), num_classes=5))
    larger = timm.create_model("vim_tiny_patch16_224", img_size=48, **file, **small)
    assert larger.pos_embed.shape == (1, 37, 16)
    assert torch.equal(larger.pos_embed[:, 18], model.pos_embed[:, 8])  # the token's
    with pytest.raises(UserError, match="images of 32 x 32 pixels; this model has positions for 48 x 48"):
        larger(x)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(img_size=17), "img_size is 17; its sides must be multiples of patch_size, which is 8"),
        (dict(img_size=(32, 33)), "img_size is .32, 33.; its sides must be multiples"),
        (dict(patch_size=0), "patch_size is 0; it must be between 1 and"),
        (dict(depth=-1), "depth is -1; it must be between 1 and"),
        (dict(drop_path_rate=2), "drop_path_rate is 2.0; it must be between 0 and 1"),
        (dict(d_sate=4), "unknown option of Vim 'd_sate'; did you mean 'd_state'"),
    ],
)
def test_mistakes_of_vim_are_sentences(options, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny_vim(**options)


def test_vim_has_no_feature_maps_and_says_so():
    with pytest.raises(UserError, match="features_only: vim_tiny_patch16_224 has one resolution and no stages"):
        timm.create_model("vim_tiny_patch16_224", features_only=True)
    with pytest.raises(UserError, match="one resolution and no stages"):
        create_backbone("timm/vim_tiny_patch16_224")
    with pytest.raises(UserError, match=r"images have shape \(3, 32, 32\); this model takes \(batch, 3, height, width"):
        tiny_vim()(torch.zeros(3, 32, 32))


def test_vim_is_recorded_for_any_batch_and_made_on_the_meta_device():
    model = tiny_vim().eval()
    traced = torch.jit.trace(model, torch.randn(2, 3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(traced(x), model(x))
    with torch.device("meta"):
        assert tiny_vim(drop_path_rate=0.1).layers[1].drop_path.drop_prob == 0.1


def test_the_blocks_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "sequences.md").read_text()
    blocks = re.findall(r"```python\n(.+?)```", page, re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, {})


def test_vim_is_built_by_a_config_and_its_operations_are_counted():
    config = get_config("configs/vmamba_digits.yaml", ["MODEL.NAME", "timm/vim_tiny_patch16_224"])
    model = build_model(config)
    assert isinstance(model, Vim) and model.patch_embed.img_size == (32, 32)
    one, two = (complexity(Vim(img_size=32, depth=depth), 32).macs for depth in (1, 2))
    inner, rank, states, positions = 384, 12, 16, 5
    each_way = inner * (rank + 2 * states) + rank * inner + inner * (9 * states + 1)  # projections and scan
    convolution = 4 * inner * (positions + 3) / positions  # three positions too many are computed
    a_layer = positions * (192 * 2 * inner + inner * 192 + 2 * (each_way + convolution))
    assert two - one == pytest.approx(a_layer, rel=1e-3)
