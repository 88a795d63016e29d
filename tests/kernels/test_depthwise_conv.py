"""`depthwise_conv` against PyTorch's, and its kernels: compiled for every architecture here, run on a GPU.

`test_emulated.py` runs them on an emulated GPU.
"""

import pytest
import torch
import torch.nn.functional as F

import vmamba_kernels as vk
from vmamba_kernels import registry

BACKENDS = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]
F32, BF16 = torch.float32, torch.bfloat16


SHAPES = [(2, 5, 21, 96), (3, 14, 14, 384), (2, 7, 7, 768), (1, 1, 1, 6), (1, 4, 40, 3), (5, 3, 2, 200)]


def case(shape, dtype=F32, side=3, device="cpu"):
    """x, weight with the strides that the models' have, and bias."""
    torch.manual_seed(shape[-1])
    dim = shape[3]
    x, weight, bias = (torch.randn(*s, device=device) for s in (shape, (dim, 1, side, side), (dim,)))
    weight = weight.as_strided(weight.shape, (side * side, 1, side, 1))
    return [t.requires_grad_() for t in (x.to(dtype), weight, bias)]


def by_pytorch(x, weight, bias, silu):
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[2] // 2, groups=len(weight))
    return (F.silu(out) if silu else out).permute(0, 2, 3, 1)


def relative(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silu", [False, True])
def test_output_and_gradients_agree_with_pytorch_in_float64(backend, dtype, shape, silu):
    inputs = case(shape, dtype, device="cpu" if backend == "reference" else "cuda")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = vk.depthwise_conv(*inputs, silu=silu, backend=backend), by_pytorch(*exact, silu)
    assert out.dtype == dtype and out.shape == shape
    dy = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dy)
    assert [g.dtype for g in gradients] == [dtype, F32, F32] and gradients[1].stride() == inputs[1].stride()
    bound = 1e-6 if dtype == F32 else 1e-2
    assert relative(out, expected) < bound
    for gradient, exact_gradient in zip(gradients, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert relative(gradient, exact_gradient) < bound


@pytest.mark.gpu
def test_odd_strides_sizes_and_large_images_on_the_gpu():
    x, weight, bias = (t.detach() for t in case((3, 20, 24, 96), device="cuda"))
    expected = by_pytorch(x.double(), weight.double(), None, False)
    half = torch.cat([x, x], -1)[..., :96]  # as a gate's half of a projection
    turned = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    for same in (half, turned, shifted):
        assert relative(vk.depthwise_conv(same, weight, backend="cuda"), expected) < 1e-6
    assert vk.depthwise_conv(x[:0], weight, bias, backend="cuda").shape == (0, 20, 24, 96)
    large = torch.randn(2, 700, 901, 96, device="cuda")
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (large, weight, bias)]
        out = vk.depthwise_conv(*leaves, silu=True, backend="cuda")
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    leaves = [t.double().requires_grad_() for t in (large, weight, bias)]
    out = by_pytorch(*leaves, True)
    for got, want in zip(runs[0], [out, *torch.autograd.grad(out.square().sum(), leaves)], strict=True):
        assert relative(got, want) < 1e-5
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv_cuda, (x, weight, bias, True, True))


def test_autocast_and_sides():
    x, weight, bias = case((2, 6, 5, 8), side=5)
    assert torch.equal(vk.depthwise_conv(x, weight, bias), by_pytorch(x, weight, bias, False))
    with torch.autocast("cpu", dtype=BF16):
        out, expected = vk.depthwise_conv(x, weight, bias, silu=True), by_pytorch(x, weight, bias, True)
    assert out.dtype == BF16 and torch.equal(out, expected)
    call = registry.Call("depthwise_conv", torch.device("cuda"), F32, F32, dim=8, side=5)
    if torch.cuda.is_available():
        assert registry.why_not("cuda", call) == "it convolves windows of 3 x 3, not 5 x 5"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiles_for_every_architecture(arch, tmp_path, monkeypatch):
    from vmamba_kernels.cuda.compiler import compile_cubin
    from vmamba_kernels.cuda.depthwise_conv import macros

    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(tmp_path))
    for dim, dtype, silu in ((96, BF16, True), (3, F32, False), (768, torch.float16, True)):
        for backward in (False, True):
            kind = dict(macros(dim, dtype, silu, backward))
            assert compile_cubin("depthwise_conv.cu", kind, arch)[:4] == b"\x7fELF"


def test_errors_name_the_argument():
    x, weight, bias = case((2, 6, 5, 8))
    with pytest.raises(ValueError, match=r"weight has shape \(7, 1, 3, 3\); beside x of shape \(2, 6, 5, 8\)"):
        vk.depthwise_conv(x, weight[:7], bias)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 1, 2, 2\); it must be \(dim, 1, side, side\)"):
        vk.depthwise_conv(x, weight[:, :, :2, :2], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        vk.depthwise_conv(x, weight, bias[:3])
    with pytest.raises(vk.BackendError, match="backend 'triton' cannot serve depthwise_conv here"):
        vk.depthwise_conv(x, weight, backend="triton")
