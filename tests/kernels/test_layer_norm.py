"""`layer_norm` against PyTorch's, its dtypes, and its kernels: compiled for every architecture here, run on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import vmamba_kernels as vk

DIMS = (1, 3, 48, 96, 100, 768, 1024)
BACKENDS = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]


def case(dim, dtype=torch.float32, rows=(2, 5, 7), device="cpu"):
    torch.manual_seed(dim)
    x = (3 * torch.randn(*rows, dim, device=device) + 1).to(dtype)
    return x, torch.randn(dim, device=device), torch.randn(dim, device=device)


def device_of(backend):
    return "cpu" if backend == "reference" else backend


def relative(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_agree_with_pytorch_in_float64(backend, dim, dtype, out_dtype):
    inputs = [t.requires_grad_() for t in case(dim, dtype, device=device_of(backend))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out = vk.layer_norm(*inputs, out_dtype=out_dtype, backend=backend)
    expected = F.layer_norm(exact[0], (dim,), *exact[1:])
    assert out.dtype == out_dtype
    dy = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dy)
    expected_gradients = torch.autograd.grad(expected, exact, dy.double())
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    bound = 1e-6 if dtype == out_dtype == torch.float32 else 1e-2
    assert relative(out, expected) < bound
    if dim > 1:  # the norm of one channel is its bias
        for gradient, exact_gradient in zip(gradients, expected_gradients, strict=True):
            assert relative(gradient, exact_gradient) < bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype, branch_dtype, out_dtype", [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("drops", [False, True])
def test_the_norm_of_a_sum_agrees_with_pytorch_in_float64(backend, dim, dtype, branch_dtype, out_dtype, drops):
    x, weight, bias = case(dim, dtype, rows=(3, 5, 7), device=device_of(backend))
    inputs = [t.requires_grad_() for t in (x, torch.randn_like(x, dtype=branch_dtype), weight, bias)]
    factor = torch.tensor([0.0, 1.25, 2.0], device=x.device)[:, None, None, None] if drops else None
    exact = [t.detach().double().requires_grad_() for t in inputs]
    total = exact[0] + exact[1] * (1 if factor is None else factor.double())
    expected = total, F.layer_norm(total, (dim,), *exact[2:])
    out = vk.add_layer_norm(*inputs, factor=factor, out_dtype=out_dtype, backend=backend)
    assert [t.dtype for t in out] == [torch.promote_types(dtype, branch_dtype), out_dtype]
    grads = [torch.randn_like(t) for t in out]
    gradients = torch.autograd.grad(out, inputs, grads)
    expected_gradients = torch.autograd.grad(expected, exact, [g.double() for g in grads])
    assert [g.dtype for g in gradients] == [dtype, branch_dtype, torch.float32, torch.float32]
    bound = 1e-6 if {dtype, branch_dtype, out_dtype} == {torch.float32} else 2e-2
    for one, other in zip(out, expected, strict=True):
        assert relative(one, other) < bound
    if dim > 1:
        for gradient, exact_gradient in zip(gradients, expected_gradients, strict=True):
            assert relative(gradient, exact_gradient) < bound


@pytest.mark.gpu
def test_the_norm_of_a_sum_of_odd_strides_repeats_itself():
    x, weight, bias = case(96, rows=(40, 24, 25), device="cuda")
    strided = torch.randn_like(x).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    total, norm = vk.add_layer_norm(x, strided, weight, bias, backend="cuda")
    torch.testing.assert_close(total, x + strided)
    torch.testing.assert_close(norm, F.layer_norm(x + strided, (96,), weight, bias))
    assert [t.shape for t in vk.add_layer_norm(x[:0], x[:0], weight, bias, backend="cuda")] == [(0, 24, 25, 96)] * 2
    runs = []
    for _ in range(2):
        w = weight.clone().requires_grad_()
        sum(t.square().sum() for t in vk.add_layer_norm(x, strided, w, bias, backend="cuda")).backward()
        runs.append(w.grad)
    assert torch.equal(*runs)
    for factor in (None, torch.rand(40, device="cuda")):
        arguments = (x, strided.contiguous(), factor, weight, bias, 1e-5, torch.bfloat16)
        torch.library.opcheck(torch.ops.vmamba.add_layer_norm_cuda, arguments)


@pytest.mark.gpu
def test_odd_strides_addresses_and_sizes_on_the_gpu():
    device = device_of("cuda")
    x, weight, bias = case(96, rows=(3, 4, 5), device=device)
    expected = F.layer_norm(x, (96,), weight, bias)
    strided = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    torch.testing.assert_close(vk.layer_norm(strided, weight, bias, backend="cuda"), expected)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    torch.testing.assert_close(vk.layer_norm(shifted, weight, bias, backend="cuda"), expected)
    assert vk.layer_norm(x[:0], weight, bias, backend="cuda").shape == (0, 4, 5, 96)
    runs = []
    for _ in range(2):
        w = weight.clone().requires_grad_()
        vk.layer_norm(x.repeat(400, 1, 1, 1), w, bias, backend="cuda").square().sum().backward()
        runs.append(w.grad)
    assert torch.equal(*runs)
    torch.library.opcheck(torch.ops.vmamba.layer_norm_cuda, (x, weight, bias, 1e-5, torch.bfloat16))


def test_autocast_does_not_round_what_is_asked_in_float32():
    x, weight, bias = case(96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vk.layer_norm(x, weight, bias)
    assert torch.equal(out, vk.layer_norm(x, weight, bias))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiles_for_every_architecture(arch, tmp_path, monkeypatch):
    from vmamba_kernels.cuda.compiler import compile_cubin
    from vmamba_kernels.cuda.layer_norm import macros
    from vmamba_kernels.cuda.sum_rows import MACROS

    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(tmp_path))
    for dim in (3, 96, 1024):
        for branch in (None, torch.bfloat16):
            kind = dict(macros(dim, torch.float32, torch.bfloat16, branch))
            assert compile_cubin("layer_norm.cu", kind, arch)[:4] == b"\x7fELF"
    assert compile_cubin("sum_rows.cu", dict(MACROS), arch)[:4] == b"\x7fELF"


def test_errors_name_the_argument():
    x, weight, bias = case(96)
    with pytest.raises(
        ValueError, match=r"weight has shape \(3,\); beside x of shape \(2, 5, 7, 96\) it must be \(96,\)"
    ):
        vk.layer_norm(x, weight[:3], bias)
    with pytest.raises(vk.BackendError, match="backend 'triton' cannot serve layer_norm here"):
        vk.layer_norm(x, weight, bias, backend="triton")
    with pytest.raises(ValueError, match=r"branch has shape \(2, 5, 7\); beside x of shape \(2, 5, 7, 96\)"):
        vk.add_layer_norm(x, x[..., 0], weight, bias)
    with pytest.raises(
        ValueError, match=r"factor has shape \(3,\); beside x of shape \(2, 5, 7, 96\) it must be \(2,\)"
    ):
        vk.add_layer_norm(x, x, weight, bias, factor=torch.ones(3))
    with pytest.raises(ValueError, match="factor wants a gradient, which it does not get; detach it"):
        vk.add_layer_norm(x, x, weight, bias, factor=torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match=r"x has shape \(96,\); it must be \(batch, ..., dim\)"):
        vk.add_layer_norm(x[0, 0, 0], x[0, 0, 0], weight, bias)
