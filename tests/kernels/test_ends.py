"""The states that a scan starts from and ends with, against a loop over positions in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import vmamba_kernels as vk
from vmamba_kernels import reference
from vmamba_kernels.cpu.scan import step_sizes
from vmamba_kernels.mamba import selective_scan_fn, selective_state_update

BACKENDS = ["reference", "cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton"))]
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")


def case(states, decay=4.0, length=37, dim=4, groups=2, batch=2):
    torch.manual_seed(states)
    channels = groups * dim
    shapes = [(batch, channels, length)] * 2 + [(channels, states)] + [(batch, groups, states, length)] * 2
    tensors = [torch.randn(*shape) for shape in (*shapes, (channels,), (channels,), (batch, channels, states))]
    tensors[2] = -decay * torch.rand(channels, states)
    return dict(zip(NAMES, tensors, strict=True))


def loop(u, delta, A, B, C, D, delta_bias, initial_state, softplus=True):
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], dim=1) for t in (B, C))
    delta = delta + delta_bias[:, None]
    delta, h, y = F.softplus(delta) if softplus else delta, initial_state, []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta * u)[..., t, None] * B[..., t]
        y.append((C[..., t] * h).sum(-1))
    return torch.stack(y, -1) + D[:, None] * u, h


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("states, decay", [(1, 4.0), (3, 400.0), (16, 4.0), (16, 400.0)])
def test_both_states_and_all_gradients(backend, states, decay):
    device = backend if backend in ("cuda", "triton") else "cpu"
    device = "cuda" if device == "triton" else device
    tensors = case(states, decay)
    exact = {name: t.double().requires_grad_() for name, t in tensors.items()}
    y, last = loop(**exact)
    wy, wl = torch.randn_like(y), torch.randn_like(last)
    want = [y, last, *torch.autograd.grad((y * wy).sum() + (last * wl).sum(), list(exact.values()))]
    here = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
    y, last = vk.selective_scan(**here, return_last_state=True, backend=backend)
    assert last.dtype == torch.float32
    loss = (y * wy.to(y)).sum() + (last * wl.to(y)).sum()
    for got, expected in zip([y, last, *torch.autograd.grad(loss, list(here.values()))], want, strict=True):
        assert relative(got.cpu(), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("size, decay", [(1e37, 4.0), (1e-15, 4.0), (1.0, 1e12)])
def test_states_of_any_size_and_any_decay(backend, size, decay):
    tensors = case(16, decay)
    tensors["initial_state"] = size * tensors["initial_state"].clamp(-3, 3)
    tensors |= {name: size * tensors[name] for name in ("u", "D") if size < 1}
    tensors["C"] = tensors["C"] * (0.01 if size > 1 else 1)
    want = loop(**{name: t.double() for name, t in tensors.items()})
    for got, expected in zip(vk.selective_scan(**tensors, return_last_state=True, backend=backend), want, strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_not_in_the_other_ones(backend, wrong):
    tensors = case(5)
    right, last = vk.selective_scan(**tensors, return_last_state=True, backend=backend)
    tensors["initial_state"][1, 2, 3] = wrong
    y, ends = vk.selective_scan(**tensors, return_last_state=True, backend=backend)
    assert y[1, 2].isnan().all() and ends[1, 2, 3].isnan()
    y[1, 2], ends[1, 2, 3] = right[1, 2], last[1, 2, 3]
    torch.testing.assert_close(ends[1, 2, :3], last[1, 2, :3])
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(ends[0], last[0])


NAMES_ARE_PROVEN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


@pytest.mark.skipif(not callable(torch.export.Dim.DYNAMIC), reason="PyTorch 2.6 proves too little of such a size")
@pytest.mark.parametrize("with_states", [False, True])
def test_recorded_for_any_length(with_states):
    """torch.export, whose sizes with names want every condition on them proven, which PyTorch 2.11 does not do."""

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, D, delta_bias, initial_state):
            states = dict(initial_state=initial_state, return_last_state=True) if with_states else {}
            return vk.selective_scan(u, delta, A, B, C, D, delta_bias, **states)

    open_size = torch.export.Dim if NAMES_ARE_PROVEN else lambda name, **bounds: torch.export.Dim.DYNAMIC(**bounds)
    length = open_size("length", min=2, max=4096)
    shapes = {name: {len(t.shape) - 1: length} for name, t in case(3).items() if t.dim() > 2}
    shapes = {name: shapes.get(name) if name != "initial_state" else None for name in NAMES}
    with torch.no_grad():
        program = torch.export.export(Scan(), (), case(3), dynamic_shapes=shapes, strict=False).module()
        for positions in (2, 16, 75):
            tensors = case(3, length=positions)
            for got, want in zip(program(**tensors), Scan()(**tensors), strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("softplus", [True, False])
def test_the_bits_are_those_of_any_number_of_threads(softplus):
    """Of a length that shares of two or three threads do not divide into vectors."""
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            tensors = case(3, length=4999, groups=3)
            tensors["delta"] = tensors["delta"] if softplus else tensors["delta"].abs() + 3  # above the bias
            tensors = {name: t.requires_grad_() for name, t in tensors.items()}
            y, last = vk.selective_scan(**tensors, delta_softplus=softplus, return_last_state=True, backend="cpu")
            loss = (y * y.detach()).sum() + last.sum()
            results.append([y, last, *torch.autograd.grad(loss, list(tensors.values()))])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, another) for one, another in zip(results[0], other, strict=True))


def test_steps_by_themselves_are_the_reference():
    for shift in (-80.0, -10.0, 0.0, 10.0, 90.0):
        tensors = [t.double().requires_grad_() for t in (torch.randn(2, 5, 37) + shift, torch.randn(5))]
        low = [t.detach().float().requires_grad_() for t in tensors]
        dy = torch.randn(2, 5, 37)
        want, got = reference.step_sizes(*tensors, True), step_sizes(*low, True)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-36)
        wanted = torch.autograd.grad(want, tensors, dy.double())
        for one, other in zip(torch.autograd.grad(got, low, dy, create_graph=shift > 0), wanted, strict=True):
            assert relative(one, other) < 1e-5
    delta = torch.randn(2, 5, 37)[..., ::2]
    assert torch.equal(step_sizes(delta, None, False), delta)
    assert step_sizes(torch.tensor([[[math.nan]]]), None, True).isnan().all()


def test_a_sequence_in_two_halves_is_the_whole():
    whole = {name: t.double() for name, t in case(5, length=30).items()}
    y, last = vk.selective_scan(**whole, return_last_state=True)
    halves, state = [], whole["initial_state"]
    for part in (slice(0, 11), slice(11, 30)):
        cut = {name: whole[name][..., part] if name in ("u", "delta", "B", "C") else whole[name] for name in NAMES}
        half, state = vk.selective_scan(**{**cut, "initial_state": state}, return_last_state=True)
        halves.append(half)
    torch.testing.assert_close(torch.cat(halves, -1), y)
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(vk.selective_scan(**whole), y)


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_steps_one_by_one_are_the_scan(groups):
    tensors = {name: t.double() for name, t in case(3, groups=groups or 1, dim=8 // (groups or 1)).items()}
    u, delta, A, B, C, D, bias, state = tensors.values()
    z = torch.randn_like(u)
    want, last = selective_scan_fn(
        u, delta, A, B, C, D, z, delta_bias=bias, delta_softplus=True, return_last_state=True, initial_state=state
    )
    torch.testing.assert_close(loop(**tensors)[1], last)
    state = state.clone()
    for t in range(u.shape[2]):
        B_t, C_t = (each[:, 0, :, t] if groups is None else each[..., t] for each in (B, C))
        y = selective_state_update(
            state, u[..., t], delta[..., t], A, B_t, C_t, D, z[..., t], dt_bias=bias, dt_softplus=True
        )
        torch.testing.assert_close(y, want[..., t])
    torch.testing.assert_close(state, last)


def test_half_precision_keeps_the_state_in_float32():
    tensors = case(4)
    low = {name: t.bfloat16() if name in ("u", "delta", "B", "C") else t for name, t in tensors.items()}
    y, last = vk.selective_scan(**low, return_last_state=True)
    want, want_last = loop(**{name: t.double() for name, t in low.items()})
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert relative(last, want_last) < 1e-5 and relative(y, want) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_states_in_float32(dtype):
    """Over steps of 0 a state comes out as it went in."""
    tensors = case(4)
    still = tensors | dict(delta=torch.zeros_like(tensors["delta"]), delta_bias=torch.zeros_like(tensors["delta_bias"]))
    with torch.autocast("cpu", dtype):
        _, last = vk.selective_scan(**still, delta_softplus=False, return_last_state=True)
        y, ends = vk.selective_scan(**tensors, return_last_state=True)
    assert last.dtype == torch.float32 and relative(last, still["initial_state"].double()) < 1e-6
    want, want_ends = loop(**{name: t.double() for name, t in tensors.items()})
    assert relative(y, want) < 2e-2 and relative(ends, want_ends) < 2e-2


def test_errors_name_the_argument():
    tensors = case(3)
    with pytest.raises(
        ValueError, match=r"initial_state has shape \(2, 8, 2\); beside u of shape \(2, 8, 37\) it must be"
    ):
        vk.selective_scan(**{**tensors, "initial_state": tensors["initial_state"][..., :2]})
    for name, wrong in dict(initial_state=[1.0], u=[1.0], A=None, D=3).items():
        with pytest.raises(ValueError, match=f"{name} is a {type(wrong).__name__}; it must be a tensor"):
            vk.selective_scan(**tensors | {name: wrong})
    with pytest.raises(ValueError, match="initial_state is a list; it must be a tensor"):
        selective_scan_fn(*list(tensors.values())[:5], initial_state=[1.0])
    with pytest.raises(ValueError, match="state is a NoneType; it must be a tensor"):
        selective_state_update(None, *[torch.zeros(2, 8)] * 5)
    state, x, vector = torch.zeros(2, 8, 3), torch.zeros(2, 8), torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"dt has shape \(2, 7\); beside a state of shape \(2, 8, 3\) it must be \(2, 8\)"
    ):
        selective_state_update(state, x, x[:, :7], tensors["A"], vector, vector)
    with pytest.raises(ValueError, match=r"B has shape \(2, 3, 3\); it must be \(2, 3\) or \(2, groups, 3\)"):
        selective_state_update(state, x, x, tensors["A"], torch.zeros(2, 3, 3), vector)
    with pytest.raises(ValueError, match=r"state has shape \(8, 3\)"):
        selective_state_update(state[0], x, x, tensors["A"], vector, vector)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match=f"state is {dtype}; it must be one of torch.float16"):
            selective_state_update(state.to(dtype), x, x, tensors["A"], vector, vector)
        with pytest.raises(ValueError, match=f"x is {dtype}; it must be one of"):
            selective_state_update(state, x.to(dtype), x, tensors["A"], vector, vector)
        with pytest.raises(ValueError, match=f"z is {dtype}; it must be one of"):
            u, delta, A, B, C, *_ = tensors.values()
            selective_scan_fn(u, delta, A, B, C, z=u.to(dtype))
    held = torch.zeros(100)
    for shared in (
        state[:1].expand(2, 8, 3),
        held.as_strided((2, 8, 3), (1, 1, 1)),
        held.as_strided((2, 8, 3), (20, 2, 1)),
        held.as_strided((2, 8, 3), (23, 3, 1)),
    ):
        with pytest.raises(ValueError, match=r"state has strides .* in an expanded tensor; give state.clone\(\)"):
            selective_state_update(shared, x, x, tensors["A"], vector, vector)
    for apart in (held.as_strided((2, 8, 3), (24, 3, 1)), held.as_strided((2, 8, 3), (1, 2, 20))):
        selective_state_update(apart, x, x, tensors["A"], vector, vector)
