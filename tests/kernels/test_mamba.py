"""Mamba's function on our operators against a loop, and its package, by a stand-in, as a backend."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import vmamba_kernels as vk
from vmamba_kernels import mamba
from vmamba_kernels.mamba import selective_scan_fn

BATCH, DIM, LENGTH, STATES = 2, 4, 9, 3


def loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The recurrence position by position; B and C of any of their shapes."""

    def everywhere(t):  # -> (batch, dim, states, length)
        if t.dim() == 2:
            return t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
        t = t[:, None] if t.dim() == 3 else t
        return t.repeat_interleave(u.shape[1] // t.shape[1], dim=1)

    B, C = everywhere(B), everywhere(C)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    y = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        y.append((C[..., t] * h).sum(-1))
    y = torch.stack(y, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def shaped(dimensions, groups=2):
    shape = {2: (DIM, STATES), 3: (BATCH, STATES, LENGTH), 4: (BATCH, groups, STATES, LENGTH)}[dimensions]
    return torch.randn(shape, dtype=torch.float64)


def inputs(b=3, c=3, optional=True):
    torch.manual_seed(10 * b + c)
    case = dict(
        u=torch.randn(BATCH, DIM, LENGTH, dtype=torch.float64),
        delta=torch.rand(BATCH, DIM, LENGTH, dtype=torch.float64),
        A=-torch.rand(DIM, STATES, dtype=torch.float64) * 3,
        B=shaped(b),
        C=shaped(c),
    )
    if optional:
        case["D"] = torch.randn(DIM, dtype=torch.float64)
        case["z"] = torch.randn(BATCH, DIM, LENGTH, dtype=torch.float64)
        case["delta_bias"] = torch.randn(DIM, dtype=torch.float64)
    return {name: t.requires_grad_() for name, t in case.items()}


@pytest.mark.parametrize("b", [2, 3, 4])
@pytest.mark.parametrize("c", [2, 3, 4])
@pytest.mark.parametrize("optional", [True, False])
def test_agrees_with_the_loop(b, c, optional):
    case = inputs(b, c, optional)
    expected, expected_state = loop(**case, delta_softplus=optional)
    y, state = selective_scan_fn(**case, delta_softplus=optional, return_last_state=True)
    alone = selective_scan_fn(**case, delta_softplus=optional)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(state, expected_state)

    weight, weight_state = torch.randn_like(y), torch.randn_like(state)
    tensors = list(case.values())
    wanted = torch.autograd.grad((expected * weight).sum() + (expected_state * weight_state).sum(), tensors)
    grads = torch.autograd.grad((y * weight).sum() + (state * weight_state).sum(), tensors)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_dtypes_are_mambas():
    case = {name: t.detach().float() for name, t in inputs().items()}
    half = {name: t.bfloat16() if name in ("u", "delta", "B", "C", "z") else t for name, t in case.items()}
    y, state = selective_scan_fn(**half, delta_softplus=True, return_last_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = loop(**{name: t.float() for name, t in half.items()}, delta_softplus=True)
    assert (y.float() - expected).norm() / expected.norm() < 1e-2


def test_errors_name_the_argument():
    case = inputs()
    with pytest.raises(ValueError, match="A is torch.complex64; only real state spaces"):
        selective_scan_fn(**{**case, "A": torch.zeros(DIM, STATES, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"B has shape \(3,\); it must be \(dim, states\)"):
        selective_scan_fn(**{**case, "B": torch.zeros(STATES, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"z has shape \(2, 4, 1\)"):
        selective_scan_fn(**{**case, "z": torch.zeros(BATCH, DIM, 1, dtype=torch.float64)})


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A package with the interface of mamba_ssm's selective scan and its demands; `calls` counts its use."""
    package, ops = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops")
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    package.calls = 0

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        package.calls += 1
        assert u.dtype == delta.dtype == B.dtype == C.dtype
        assert all(t.is_contiguous() for t in (u, delta, B, C))
        assert all(t is None or t.dtype == torch.float32 for t in (A, D, delta_bias))
        floats = (t if t is None else t.float() for t in (u, delta, A, B, C, D, z, delta_bias))
        y, state = loop(*floats, delta_softplus)
        return (y.to(u.dtype), state) if return_last_state else y.to(u.dtype)

    interface.selective_scan_fn = scan
    for module in (package, ops, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mamba, "find_spec", lambda name: object() if name == "mamba_ssm" else None)
    return package


CUDA = vk.Call("selective_scan", torch.device("cuda"), torch.float32, torch.float32, states=STATES)


def test_mamba_ssm_is_used_only_when_asked_for(mamba_ssm):
    assert mamba.why_not(CUDA) is None
    assert "mamba_ssm" not in vk.backends("selective_scan")
    case = {name: t.detach().float() for name, t in inputs(4, 4).items() if name != "z"}
    expected = vk.selective_scan(**case)
    assert mamba_ssm.calls == 0
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    y = mamba.OPERATORS["selective_scan"](*(case[name] for name in order), True, torch.float32)
    assert mamba_ssm.calls == 1
    torch.testing.assert_close(y, expected)


def test_mamba_ssm_keeps_the_digits_of_the_step(mamba_ssm):
    case = {name: t.detach().float() for name, t in inputs(4, 4).items() if name != "z"}
    case.update({name: case[name].bfloat16() for name in ("u", "B", "C")})
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    y = mamba.OPERATORS["selective_scan"](*(case[name] for name in order), True, torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, vk.selective_scan(**case, out_dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_mamba_ssm_says_why_not(mamba_ssm, monkeypatch):
    case = {name: t.detach().float() for name, t in inputs(4, 4).items() if name != "z"}
    with pytest.raises(vk.BackendError, match="backend 'mamba_ssm' cannot serve selective_scan here: .* on 'cpu'"):
        vk.selective_scan(**case, backend="mamba_ssm")
    monkeypatch.setattr(mamba, "find_spec", lambda name: None)
    with pytest.raises(vk.BackendError, match="mamba_ssm is not installed"):
        vk.selective_scan(**case, backend="mamba_ssm")


def test_a_broken_mamba_ssm_is_one_sentence(mamba_ssm):
    del sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn
    case = {name: t.detach().float() for name, t in inputs(4, 4).items() if name != "z"}
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    with pytest.raises(vk.BackendError, match="mamba_ssm is installed but cannot be imported: .* 'selective_scan_fn'"):
        mamba.OPERATORS["selective_scan"](*(case[name] for name in order), True, torch.float32)


def test_b_and_c_of_the_scans_groups_are_not_copied(monkeypatch):
    """torch.compile keeps views of such copies for the backward pass, and cannot lay them out for another length."""
    seen = []
    monkeypatch.setattr(mamba, "selective_scan", lambda u, delta, A, B, C, *_, **__: seen.extend((B, C)) or u)
    u, A, (B, C) = torch.randn(2, 4, 5), torch.randn(4, 3), torch.randn(2, 2, 3, 5)
    selective_scan_fn(u, u, A, B, C[:, None].repeat(1, 2, 1, 1))
    assert torch.equal(seen[0], B[:, None].expand(2, 2, 3, 5))
    selective_scan_fn(u, u, A, B, C)
    assert [t.data_ptr() for t in seen[2:]] == [B.data_ptr(), C.data_ptr()]
