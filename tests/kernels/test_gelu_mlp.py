"""`gelu_mlp` against PyTorch's layers, and its kernels: compiled for every architecture here, run on a GPU.

`test_emulated.py` runs them on an emulated GPU.
"""

import pytest
import torch
from timm.layers import Mlp
from torch import nn

import vmamba_kernels as vk
from vmamba.models import layers

BACKENDS = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def case(shape, hidden, out, dtype=F32, device="cpu"):
    """x, and the weights and biases of both layers."""
    torch.manual_seed(hidden)
    shapes = shape, (hidden, shape[-1]), (hidden,), (out, hidden), (out,)
    scales = 2.0, shape[-1] ** -0.5, 1.0, hidden**-0.5, 1.0
    inputs = (torch.randn(*s, device=device) * scale for s, scale in zip(shapes, scales, strict=True))
    return [t.to(dtype).requires_grad_() for t in inputs]


def by_pytorch(x, weight1, bias1, weight2, bias2):
    return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, weight1, bias1)), weight2, bias2)


def relative(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape, hidden, out", [((2, 7, 5, 96), 384, 96), ((300, 12), 50, 20), ((5, 3), 7, 1)])
def test_output_and_gradients_agree_with_pytorch_in_float64(backend, dtype, shape, hidden, out):
    inputs = case(shape, hidden, out, dtype, "cpu" if backend == "reference" else "cuda")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, want = vk.gelu_mlp(*inputs, backend=backend), by_pytorch(*exact)
    assert got.dtype == dtype and got.shape == (*shape[:-1], out)
    dy = torch.randn_like(got)
    gradients = torch.autograd.grad(got, inputs, dy)
    bound = 2e-3 if dtype == F32 and backend == "cuda" else 1e-6 if dtype == F32 else 1e-2  # products in TF32
    assert relative(got, want) < bound
    for gradient, expected in zip(gradients, torch.autograd.grad(want, exact, dy.double()), strict=True):
        assert gradient.dtype == dtype and relative(gradient, expected) < bound


@pytest.mark.gpu
def test_the_gpu_gives_the_same_bits_and_keeps_less():
    inputs = case((64, 28, 28, 192), 768, 192, BF16, "cuda")
    runs, kept = [], []
    for step in (vk.gelu_mlp, vk.gelu_mlp, by_pytorch):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = step(*inputs)
        kept.append(torch.cuda.memory_allocated() - before - out.nbytes)
        runs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*runs[:2], strict=True))
    hidden = 64 * 28 * 28 * 768 * 2
    assert kept[0] == pytest.approx(hidden, rel=0.01) and kept[2] == pytest.approx(2 * hidden, rel=0.01)
    turned = inputs[0].detach().transpose(0, 1)
    assert relative(vk.gelu_mlp(turned, *inputs[1:]), by_pytorch(turned, *inputs[1:])) < 1e-2
    leaves = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.vmamba.gelu_mlp_cuda, (leaves[0][:1], *leaves[1:], True))


def test_autocast_takes_everything_to_its_dtype():
    inputs = case((2, 3, 8), 32, 8)
    with torch.autocast("cpu", dtype=BF16):
        got, want = vk.gelu_mlp(*inputs), by_pytorch(*inputs)
    assert got.dtype == BF16 and torch.equal(got, want)
    assert [g.dtype for g in torch.autograd.grad(got.sum(), inputs)] == [F32] * 5


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiles_for_every_architecture(arch, tmp_path, monkeypatch):
    from vmamba_kernels.cuda.compiler import compile_cubin
    from vmamba_kernels.cuda.mlp import macros

    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(tmp_path))
    for dim, dtype in ((384, BF16), (7, F32), (3072, F16)):
        assert compile_cubin("mlp.cu", dict(macros(dim, dtype)), arch)[:4] == b"\x7fELF"


def test_errors_name_the_argument():
    x, weight1, bias1, weight2, bias2 = case((2, 3, 8), 32, 8)
    with pytest.raises(ValueError, match=r"weight1 has shape \(32, 7\); beside x of shape \(2, 3, 8\) it must be"):
        vk.gelu_mlp(x, weight1[:, :7], bias1, weight2, bias2)
    with pytest.raises(ValueError, match=r"weight2 has shape \(8, 31\); beside weight1 of shape \(32, 8\) it must be"):
        vk.gelu_mlp(x, weight1, bias1, weight2[:, :31], bias2)
    with pytest.raises(ValueError, match=r"bias2 has shape \(7,\)"):
        vk.gelu_mlp(x, weight1, bias1, weight2, bias2[:7])
    with pytest.raises(ValueError, match="they must be .hidden, dim. and .out, hidden."):
        vk.gelu_mlp(x, weight1[0], bias1, weight2, bias2)
    with pytest.raises(vk.BackendError, match="backend 'triton' cannot serve gelu_mlp here"):
        vk.gelu_mlp(x, weight1, bias1, weight2, bias2, backend="triton")


def _changed(kind):
    mlp = layers.mlp(8, 4.0, "silu" if kind == "another activation" else "gelu", 0.5 * (kind == "dropout"), False)
    if kind == "tanh":
        mlp.act = nn.GELU("tanh")
    if kind == "hook":
        mlp.act.register_forward_hook(lambda module, inputs, output: output + 1)
    if kind == "replaced":
        mlp.fc2 = nn.Sequential(nn.Linear(32, 8))
    if kind == "no bias":
        mlp.fc1 = nn.Linear(8, 32, bias=False)
    return mlp.train(kind == "dropout")


@pytest.mark.parametrize("kind", ["ours", "another activation", "dropout", "tanh", "hook", "replaced", "no bias"])
def test_only_what_is_ours_and_unseen_is_one_operator(kind, monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "gelu_mlp", lambda *inputs: calls.append(1) or vk.gelu_mlp(*inputs))
    mlp = _changed(kind)
    x = torch.randn(2, 3, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    got = layers.through_mlp(mlp, x)
    torch.manual_seed(0)
    assert type(mlp) is Mlp and torch.equal(got, mlp(x)) and bool(calls) == (kind == "ours")
