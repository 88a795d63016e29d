"""The cpu backend: its numbers against the reference in float64, and the contract of a backend."""

import pytest
import torch

import vmamba_kernels as vk
from vmamba_kernels import registry
from vmamba_kernels.cpu import loops, scan
from vmamba_kernels.cpu.loops import BLOCK, STATES, TILE

ROUTES = vk.ROUTES
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def image(batch=2, height=3, width=5, dim=4, states=2, rank=2, routes=ROUTES, bias=True, skip=True, dtype=F32):
    torch.manual_seed(height * width + dim)
    k = len(routes)
    return dict(
        x=torch.randn(batch, height, width, dim).to(dtype),
        x_proj_weight=(torch.randn(k, rank + 2 * states, dim) / dim**0.5).to(dtype),
        dt_weight=(torch.randn(k, dim, rank) / rank**0.5).to(dtype),
        dt_bias=torch.randn(k, dim) - 2 if bias else None,
        A=-torch.rand(k, dim, states) * states - 0.1,
        D=torch.randn(k, dim) if skip else None,
    )


def sequence(batch=2, groups=2, dim=3, length=7, states=4, bias=True, skip=True, softplus=True, dtype=F32):
    torch.manual_seed(length + dim)
    channels = groups * dim
    return dict(
        u=torch.randn(batch, channels, length).to(dtype),
        delta=(torch.randn(batch, channels, length) - 2 if softplus else torch.rand(batch, channels, length)).to(dtype),
        A=-torch.rand(channels, states) * states - 0.1,
        B=torch.randn(batch, groups, states, length).to(dtype),
        C=torch.randn(batch, groups, states, length).to(dtype),
        D=torch.randn(channels) if skip else None,
        delta_bias=torch.randn(channels) if bias else None,
    )


def run(operator, case, backend, dtype=None, **options):
    """The output and the gradients of every tensor of the case, computed in its dtypes or all in `dtype`."""
    case = {k: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for k, t in case.items()}
    out = operator(**case, backend=backend, **options)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    here = {name: t for name, t in case.items() if t is not None}
    return {"out": out.detach(), **dict(zip(here, torch.autograd.grad(out, list(here.values()), dy), strict=True))}


def check(operator, case, **options):
    """1e-6 sqrt(length) in float32; in the half types 1e-2, or half as much again as the reference in them."""
    want = run(operator, case, "reference", F64, **options)
    got = run(operator, case, "cpu", **options)
    first = next(iter(case.values()))
    length = first.shape[-1] if operator is vk.selective_scan else first.shape[1] * first.shape[2]
    bounds = dict.fromkeys(want, 1e-6 * length**0.5 + 3e-6)
    if first.dtype != F32:
        plain = run(operator, case, "reference", **options)
        bounds = {name: max(1e-2, 1.5 * relative(plain[name], t)) for name, t in want.items()}
    for name, t in want.items():
        assert got[name].dtype == (case[name].dtype if name in case else F32 if first.dtype == F16 else first.dtype)
        assert got[name].shape == t.shape and got[name].is_contiguous()
        assert relative(got[name], t) <= bounds[name], name


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-20)).item()


@pytest.mark.parametrize("case", [
    dict(states=1),
    dict(states=STATES, dim=BLOCK + 1, rank=3),
    dict(states=2 * STATES + 3, dim=5, rank=5, routes=("col", "row_rev", "col")),  # three passes
    dict(batch=1, height=1, width=1, dim=7, states=5, rank=1, routes=("col_rev",), bias=False),
    dict(batch=3, height=TILE, width=3, dim=2 * BLOCK, states=1, rank=8, skip=False),
    dict(batch=1, height=1, width=2 * TILE + 1, dim=3, states=3),
    dict(batch=1, height=TILE - 1, width=1, dim=1, states=1, rank=1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_images_agree_with_the_reference_in_float64(case, dtype):
    check(vk.cross_selective_scan, image(**case, dtype=dtype), routes=case.get("routes", ROUTES))


@pytest.mark.parametrize("case", [
    dict(states=1),
    dict(states=STATES + 1, dim=BLOCK + 3, groups=1, length=3 * TILE + 2, skip=False),
    dict(states=STATES, groups=3, length=TILE, bias=False),
    dict(batch=1, groups=1, dim=1, length=1, states=2),
    dict(softplus=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_sequences_agree_with_the_reference_in_float64(case, dtype):
    check(vk.selective_scan, sequence(**case, dtype=dtype), delta_softplus=case.get("softplus", True))


@pytest.mark.parametrize("shift", [-60.0, -15.0, 15.0, 100.0])
def test_steps_far_from_one(shift):
    """Where softplus is its asymptote, and where decays are all one or underflow."""
    case = image(states=3)
    case["dt_bias"] += shift
    want, got = (run(vk.cross_selective_scan, case, *of) for of in (("reference", F64), ("cpu",)))
    for name, t in want.items():
        assert (got[name].double() - t).norm() <= 1e-5 * t.norm() + 1e-30, name


def test_nothing_hides_what_is_not_finite():
    for value in (float("nan"), float("inf")):
        case = image()
        case["x"][0, 1, 2, 3] = value
        out = vk.cross_selective_scan(**case, backend="cpu")
        assert not out[0].isfinite().any() and out[1].isfinite().all()
    growing = sequence(length=200)
    growing["A"] = growing["A"].abs() * 20
    assert not vk.selective_scan(**growing, backend="cpu").isfinite().all()


def test_an_exponential_has_the_relative_error_that_it_claims():
    x = torch.linspace(-126, 127, 10**6)
    got = torch.empty_like(x)
    _exp2_of_all(x.numpy(), got.numpy())
    assert ((got.double() / x.double().exp2()) - 1).abs().max() < 2e-7
    ends = torch.tensor([0.0, -1e4, 1e4])
    _exp2_of_all(ends.numpy(), ends.numpy())
    assert ends.tolist() == [1.0, 2.0**-126, 2.0**127]


@loops.njit
def _exp2_of_all(x, out):
    for i in range(len(x)):
        out[i] = loops.exp2(x[i])


def test_empty_batches():
    for operator, case in ((vk.cross_selective_scan, image(batch=0)), (vk.selective_scan, sequence(batch=0))):
        for name, t in run(operator, case, "cpu").items():
            assert t.count_nonzero() == 0, name
            assert name == "out" or t.shape == case[name].shape


def test_strides_do_not_matter():
    case = image(height=4, width=6, dim=8)
    want = run(vk.cross_selective_scan, case, "cpu")
    for name in ("x", "x_proj_weight", "dt_weight", "A"):
        t = case[name]
        case[name] = t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    got = run(vk.cross_selective_scan, case, "cpu")
    assert all(torch.equal(got[name], t) for name, t in want.items())
    x = case["x"].requires_grad_()
    sums = [vk.cross_selective_scan(**case, backend=name).sum() for name in ("cpu", "reference")]
    torch.testing.assert_close(*(torch.autograd.grad(each, x)[0] for each in sums))  # a gradient without memory


# ---------------------------------------------------------------------------------------------------------- contract


def test_opcheck():
    def ready(case):
        return tuple(t if t is None else t.requires_grad_() for t in case.values())

    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    inputs = ready(image(batch=1, height=2, routes=("row", "col_rev"), skip=False))
    torch.library.opcheck(scan.IMAGE._operator, (*inputs, "row col_rev", F32, True), test_utils=tests)
    inputs = ready(sequence(bias=False))
    torch.library.opcheck(scan.SEQUENCE._operator, (*inputs, True, F32, True), test_utils=tests)


def test_what_torch_compile_records_is_the_backend():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    case = image()
    torch.compile(lambda x: vk.cross_selective_scan(**{**case, "x": x}), backend=keep)(case["x"])
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "vmamba.cross_selective_scan_cpu.default" in called, called


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    case = {name: t.requires_grad_() for name, t in image(routes=("col",)).items()}

    def block(x):
        x = vk.cross_selective_scan(**{**case, "x": x}, routes=("col",))
        return vk.cross_selective_scan(**{**case, "x": torch.tanh(x)}, routes=("col",))

    def grads(function):
        y = function(case["x"])
        return y, *torch.autograd.grad(y.square().sum(), list(case.values()))

    expected = grads(block)
    assert vk.choose(call_of(case)) == "cpu"
    compiled = grads(torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager"))
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    checkpointed = grads(lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, expected, strict=True))


def call_of(case, **changes):
    x = case["x"]
    sizes = dict(dim=x.shape[3], states=case["A"].shape[2], rank=case["dt_weight"].shape[2], routes=ROUTES)
    return vk.Call(
        **{
            **dict(operator="cross_selective_scan", device=x.device, dtype=x.dtype, out_dtype=x.dtype),
            **sizes,
            **changes,
        }
    )


def test_autocast_takes_images_to_its_dtype_and_computes_in_float32():
    case = image(height=7, width=9, dim=40, states=4)
    with torch.autocast("cpu", dtype=BF16):
        out = vk.cross_selective_scan(**case, backend="cpu")
        gradients = run(vk.cross_selective_scan, case, "cpu")  # the backward pass under it too
    rounded = {name: t.to(BF16) if name in ("x", "x_proj_weight", "dt_weight") else t for name, t in case.items()}
    assert out.dtype == BF16 and torch.equal(out, vk.cross_selective_scan(**rounded, backend="cpu"))
    want = run(vk.cross_selective_scan, rounded, "reference", F64)
    assert relative(gradients["A"], want["A"]) < 1e-2 and gradients["A"].dtype == F32


def test_second_derivatives_are_the_references():
    for operator, case in ((vk.cross_selective_scan, image(bias=False)), (vk.selective_scan, sequence(skip=False))):
        found = []
        for backend in ("cpu", "reference"):
            inputs = {name: None if t is None else t.clone().requires_grad_() for name, t in case.items()}
            here = [t for t in inputs.values() if t is not None]
            out = operator(**inputs, backend=backend)
            gradients = torch.autograd.grad(out.square().sum(), here[:3], create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), here))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3 * want.abs().max().item())


def test_counts_multiply_adds_as_the_other_backends_do():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        vk.cross_selective_scan(**image(batch=2, height=3, width=5, dim=4, states=2, rank=2), backend="cpu")
    assert counter.get_total_flops() == 2 * (2 * 3 * 5 * 4) * 4 * (2 + 2 * 2 + 2 + 9 * 2 + 1)


def test_traces_and_exports_do_not_need_it():
    """What is recorded on a CPU runs where nothing of ours is installed."""
    case = image()

    class Scan(torch.nn.Module):
        def forward(self, x):
            return vk.cross_selective_scan(**{**case, "x": x})

    x = case["x"]
    traced = torch.jit.trace(Scan(), x)
    exported = torch.export.export(Scan(), (x,), strict=False)
    assert "vmamba::" not in str(traced.inlined_graph) and "ops.vmamba" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), Scan()(x))


def test_says_why_it_cannot_serve():
    case = image()
    assert vk.choose(call_of(case)) == "cpu"
    assert vk.choice(call_of(case, dtype=F64, out_dtype=F64)).backend == "reference"
    for change, words in (
        (dict(dtype=F64), "float64 is computed by the reference"),
        (dict(out_dtype=F64), "float64 is computed by the reference"),
        (dict(device=torch.device("meta")), "on meta"),
        (dict(states=0), "no states"),
        (dict(rank=0), "rank 0"),
        (dict(routes=("diagonal",)), "diagonal"),
    ):
        assert words in vk.explain(call_of(case, **change))["cpu"]


def test_without_numba_the_reference_serves_and_a_large_model_is_told_once(monkeypatch, recwarn):
    load = registry.load

    def without(name):
        if name == "cpu":
            raise ImportError("No module named 'numba'; pip install numba")
        return load(name)

    monkeypatch.setattr(registry, "load", without)
    for cached in (registry._chosen, registry._advise):
        cached.cache_clear()
    small, large = image(dim=8), image(dim=registry.LARGE)
    out = vk.cross_selective_scan(**small)
    assert torch.equal(out, vk.cross_selective_scan(**small, backend="reference")) and not recwarn
    with pytest.warns(UserWarning, match="backend 'cpu': it cannot be imported .*; pip install numba"):
        vk.cross_selective_scan(**large)
    vk.cross_selective_scan(**image(dim=2 * registry.LARGE))
    assert not recwarn
    for cached in (registry._chosen, registry._advise):
        cached.cache_clear()


def test_what_is_beyond_the_channels_of_a_block_counts_for_nothing():
    """Of long sequences, whose given steps went through the softplus over and over there until they were infinite; and
    where one route's numbers are not finite."""
    case = sequence(batch=1, groups=1, dim=3, states=1, length=6000)
    got, want = (run(vk.selective_scan, case, backend) for backend in ("cpu", "reference"))
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm(), name
    case = image(batch=1, height=6, width=6, dim=8, states=2, rank=3)
    case["x_proj_weight"].view(-1)[5] = float("nan")  # of the first route
    got, want = (run(vk.cross_selective_scan, case, backend) for backend in ("cpu", "reference"))
    for name in want:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name


def test_torch_func_is_for_the_reference():
    case = image()
    x = case.pop("x")

    def scan(x, backend):
        return vk.cross_selective_scan(x, **case, backend=backend)

    with pytest.raises(vk.BackendError, match="'cpu' cannot serve torch.func or forward-mode AD, .* leave it at auto"):
        torch.func.jvp(lambda x: scan(x, "cpu"), (x,), (x,))
    for backend in (None, "reference"):
        assert torch.func.jvp(lambda x, backend=backend: scan(x, backend), (x,), (x,))[1].abs().max() > 0
