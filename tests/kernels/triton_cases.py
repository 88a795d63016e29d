"""The Triton backend against the reference.  test_triton.py runs this file in a process of its own: through Triton's
interpreter, which must be chosen before the kernels are defined, and again natively where there is a GPU."""

import itertools
import os

import pytest
import torch

import vmamba_kernels as vk
from vmamba_kernels.triton import common, scan, ssd

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROUTES = vk.ROUTES
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def image(batch, height, width, dim, states, rank, routes=ROUTES, bias=True, skip=True):
    torch.manual_seed(height * width + dim)
    k = len(routes)
    return dict(
        x=torch.randn(batch, height, width, dim),
        x_proj_weight=torch.randn(k, rank + 2 * states, dim) / dim**0.5,
        dt_weight=torch.randn(k, dim, rank) / rank**0.5,
        dt_bias=torch.randn(k, dim) - 2 if bias else None,
        A=-torch.rand(k, dim, states) * 4,
        D=torch.randn(k, dim) if skip else None,
    )


def image_ssd(batch, height, width, heads, dim, states, routes=ROUTES, bias=True, skip=True):
    torch.manual_seed(height * width + dim)
    k = len(routes)
    return dict(
        x=torch.randn(batch, height, width, heads * dim),
        x_proj_weight=torch.randn(k, heads + 2 * states, heads * dim) / (heads * dim) ** 0.5,
        dt_bias=torch.randn(k, heads) - 1 if bias else None,
        A=-torch.rand(k, heads) * 4,
        D=torch.randn(k, heads, dim) if skip else None,
    )


def sequence(batch, groups, dim, length, states, bias=True, skip=True):
    torch.manual_seed(length + dim)
    return dict(
        u=torch.randn(batch, groups * dim, length),
        delta=torch.rand(batch, groups * dim, length),
        A=-torch.rand(groups * dim, states) * 4,
        B=torch.randn(batch, groups, states, length),
        C=torch.randn(batch, groups, states, length),
        D=torch.randn(groups * dim) if skip else None,
        delta_bias=torch.randn(groups * dim) if bias else None,
    )


VARYING = ("x", "x_proj_weight", "dt_weight", "u", "delta", "B", "C")  # the rest is at least float32


def run(operator, case, backend, dtype, lowest, **options):
    """Output and gradients, with inputs rounded to `dtype` and then computed in `lowest` or, for states, float32."""
    least = torch.promote_types(lowest, torch.float32)
    inputs = {}
    for name, t in case.items():
        t = t if t is None or name not in VARYING else t.to(dtype)
        t = t if t is None else t.to(DEVICE, lowest if name in VARYING else least)
        inputs[name] = t if t is None else t.detach().requires_grad_()
    y = operator(**inputs, backend=backend, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in inputs.items() if t is not None}}


def assert_agrees(operator, case, dtype=torch.float32, **options):
    expected = run(operator, case, "reference", dtype, torch.float64, **options)
    out = run(operator, case, "triton", dtype, dtype, **options)
    length = next(iter(case.values())).shape[1:-1].numel()
    tolerance = TOLERANCE[dtype] * (length**0.5 if dtype == torch.float32 else 1)
    errors = {n: ((out[n].double() - e).norm() / e.norm().clamp(min=1e-30)).item() for n, e in expected.items()}
    assert all(error < tolerance for error in errors.values()), errors
    return out


@pytest.fixture
def short_chunks(monkeypatch):
    """Of as many positions as the longest tile, so that small images have several."""
    monkeypatch.setattr(scan, "CHUNK", 16)


@pytest.fixture
def whole_routes(monkeypatch):
    """One program a route, however few there are, as in large batches."""
    monkeypatch.setattr(scan, "WARPS_WANTED", 0)


@pytest.mark.parametrize(
    "sizes, routes, bias, skip, dtype",
    [  # batch, height, width, dim, states, rank
        ((2, 3, 5, 4, 2, 1), ROUTES, True, True, torch.float32),
        ((1, 4, 5, 3, 1, 2), ROUTES, True, False, torch.float32),
        ((1, 2, 4, 5, 16, 3), ("row_rev", "col"), False, True, torch.float32),
        ((3, 1, 7, 2, 3, 12), ("col_rev", "row"), False, False, torch.float32),
        ((1, 7, 1, 33, 1, 1), ("col", "col_rev"), True, True, torch.float32),
        ((1, 1, 1, 1, 1, 1), ROUTES, True, True, torch.float32),
        ((1, 1, 1, 8, 4, 2), ("row",), True, True, torch.float32),  # views of what has one of everything are contiguous
        ((1, 3, 4, 2, 2, 24), ("row", "row", "row_rev"), True, False, torch.float32),
        ((1, 6, 5, 4, 2, 6), ("row_rev", "col_rev"), True, True, torch.bfloat16),
        ((2, 3, 4, 3, 16, 1), ("col",), False, True, torch.bfloat16),
        ((1, 4, 3, 6, 1, 2), ("row", "col_rev"), True, True, torch.float16),
    ],
)
def test_images(sizes, routes, bias, skip, dtype):
    case = image(*sizes, routes, bias, skip)
    assert_agrees(vk.cross_selective_scan, case, dtype, routes=routes)


@pytest.mark.usefixtures("short_chunks")
def test_an_image_of_several_chunks_split_and_whole(monkeypatch):
    case = image(1, 5, 7, 2, 2, 1, ("row", "col_rev"))
    assert 2 * scan.CHUNK < 5 * 7
    split = assert_agrees(vk.cross_selective_scan, case, routes=("row", "col_rev"))
    monkeypatch.setattr(scan, "WARPS_WANTED", 0)
    whole = assert_agrees(vk.cross_selective_scan, case, routes=("row", "col_rev"))
    assert not torch.equal(split["y"], whole["y"]) or not torch.equal(split["A"], whole["A"])  # two different paths


@pytest.mark.parametrize(
    "sizes, bias, skip, softplus, dtype",
    [  # batch, groups, dim, length, states
        ((2, 2, 3, 7, 2), True, True, True, torch.float32),
        ((1, 1, 5, 19, 16), False, True, False, torch.float32),
        ((1, 3, 1, 1, 1), True, False, True, torch.float32),
        ((1, 1, 8, 1, 4), True, True, True, torch.float32),
        ((1, 1, 2, 101, 1), False, False, True, torch.float32),  # more than a chunk
        ((1, 33, 1, 2, 1), True, True, True, torch.float32),
        ((2, 1, 4, 17, 3), True, True, True, torch.bfloat16),
    ],
)
def test_sequences(sizes, bias, skip, softplus, dtype):
    assert_agrees(vk.selective_scan, sequence(*sizes, bias, skip), dtype, delta_softplus=softplus)


@pytest.mark.parametrize(
    "sizes, routes, bias, skip, dtype",
    [  # batch, height, width, heads, dim of a head, states
        ((1, 3, 7, 2, 3, 4), ROUTES, True, True, torch.float32),
        ((1, 5, 7, 1, 2, 5), ("row_rev", "col"), False, False, torch.float32),
        ((1, 1, 3, 3, 1, 17), ("col_rev",), True, False, torch.float32),
        ((1, 1, 1, 1, 8, 4), ("row",), True, True, torch.float32),
        ((1, 4, 5, 2, 4, 1), ("row", "row"), False, True, torch.bfloat16),
    ],
)
def test_ssd(sizes, routes, bias, skip, dtype):
    case = image_ssd(*sizes, routes, bias, skip)
    assert_agrees(vk.cross_ssd, case, dtype, routes=routes, chunk_size=16)


def test_states_before_and_behind():
    """The output, the last state and all gradients at once: the state is so many more positions of the output."""

    def both(*args, **options):
        return torch.cat(vk.selective_scan(*args, return_last_state=True, **options), -1)

    case = sequence(2, 2, 3, 19, 4) | dict(initial_state=torch.randn(2, 6, 4))
    assert_agrees(both, case, out_dtype=None)


@pytest.mark.parametrize("bias", [-30.0, 20.0])
@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_extreme_steps_and_decays(bias, factor):
    """Steps near 0 and at the softplus's threshold; decays that underflow to 0."""
    routes = ("row", "col_rev")
    case = image(1, 3, 4, 2, 2, 1, routes, skip=False)
    case["dt_bias"].fill_(bias)
    case["A"] *= factor
    assert_agrees(vk.cross_selective_scan, case, routes=routes)
    case = image_ssd(1, 3, 4, 2, 1, 2, routes, skip=False)
    case["dt_bias"].fill_(bias)
    case["A"] *= factor
    assert_agrees(vk.cross_ssd, case, routes=routes)


def test_float16_does_not_overflow():
    case = image(1, 2, 3, 2, 2, 1)
    case["x"] *= 300
    out = run(vk.cross_selective_scan, case, "triton", torch.float16, torch.float16)
    expected = run(vk.cross_selective_scan, case, "reference", torch.float16, torch.float64)
    largest = torch.finfo(torch.float16).max
    assert out["y"].dtype == torch.float32
    assert out["y"].abs().max() > largest
    for name, t in out.items():  # a gradient has its input's dtype, so that the larger ones cannot be held
        if t.dtype != torch.float16 or expected[name].abs().max() < largest:
            assert (t - expected[name]).norm() < 2e-3 * expected[name].norm(), name


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(common, "LARGEST_OFFSET", 0)
    routes = ("row", "col_rev")
    assert_agrees(vk.cross_selective_scan, image(1, 3, 4, 2, 2, 1, routes), routes=routes)
    assert_agrees(vk.selective_scan, sequence(1, 1, 2, 5, 2))
    assert_agrees(vk.cross_ssd, image_ssd(1, 3, 4, 2, 1, 2, routes), routes=routes)


def test_strides_and_the_same_bits_twice():
    case = image(2, 3, 2, 3, 2, 1, ("row", "col"))
    case = {name: t.to(DEVICE).requires_grad_() for name, t in case.items()}

    def step(x):
        y = vk.cross_selective_scan(**{**case, "x": x}, routes=("row", "col"), backend="triton")
        grads = torch.autograd.grad(y.sum(), list(case.values()))  # the gradient of y is expanded
        return y, *grads

    plain = step(case["x"])
    turned = step(case["x"].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1))
    assert all(torch.equal(a, b) for a, b in zip(plain, turned, strict=True))


@pytest.mark.usefixtures("short_chunks", "whole_routes")
def test_saved_states_do_not_change_the_output():
    case = {name: t.to(DEVICE) for name, t in image(1, 4, 5, 2, 1, 1, ("row",)).items()}
    with torch.no_grad():
        without = vk.cross_selective_scan(**case, routes=("row",), backend="triton")
    case["x"].requires_grad_()
    assert torch.equal(without, vk.cross_selective_scan(**case, routes=("row",), backend="triton").detach())


@pytest.mark.parametrize("operator", [vk.cross_selective_scan, vk.selective_scan, vk.cross_ssd])
def test_an_empty_batch(operator):
    case = {"cross_selective_scan": image, "selective_scan": sequence, "cross_ssd": image_ssd}[operator.__name__]
    case = case(0, 2, 3, 4, 2) if operator is vk.selective_scan else case(0, 2, 3, 2, 2, 1)
    for name, t in run(operator, case, "triton", torch.float32, torch.float32).items():
        assert t.count_nonzero() == 0, name


def test_opcheck():
    def ready(case):
        return tuple(t if t is None else t.to(DEVICE).requires_grad_() for t in case.values())

    code = common.encode_routes(("row", "col_rev"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    inputs = ready(image(1, 2, 3, 2, 2, 1, ("row", "col_rev"), skip=False))
    torch.library.opcheck(scan._cross, (*inputs, code, torch.float32, True), test_utils=tests)
    torch.library.opcheck(scan._scan, (*ready(sequence(1, 1, 2, 4, 1)), True, torch.float32, True), test_utils=tests)
    inputs = ready(image_ssd(1, 2, 3, 2, 1, 1, ("row", "col_rev"), bias=False))
    torch.library.opcheck(ssd._ssd, (*inputs, code, 16, torch.float32), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_used_twice(dynamic):
    case = {name: t.to(DEVICE).requires_grad_() for name, t in image(1, 2, 3, 2, 1, 1, ("col",)).items()}

    def block(x):
        x = vk.cross_selective_scan(**{**case, "x": x}, routes=("col",), backend="triton")
        return vk.cross_selective_scan(**{**case, "x": torch.tanh(x)}, routes=("col",), backend="triton")

    def grads(function):
        y = function(case["x"])
        return y, *torch.autograd.grad(y.square().sum(), list(case.values()))

    expected = grads(block)
    compiled = grads(torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager"))
    for a, b in itertools.zip_longest(compiled, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    checkpointed = grads(lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, expected, strict=True))
