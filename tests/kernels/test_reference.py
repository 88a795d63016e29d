"""The specification against loops over positions, and the contract around it: routes, dtypes, errors, the registry."""

import pytest
import torch

import vmamba_kernels as vk

from . import naive


def relative(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


def sequences(batch=2, groups=2, dim=3, length=7, states=4, dtype=torch.float32, step=-2.0):
    return dict(
        u=torch.randn(batch, groups * dim, length, dtype=dtype),
        delta=torch.randn(batch, groups * dim, length, dtype=dtype) + step,
        A=-torch.rand(groups * dim, states, dtype=dtype) * states - 0.1,
        B=torch.randn(batch, groups, states, length, dtype=dtype),
        C=torch.randn(batch, groups, states, length, dtype=dtype),
        D=torch.randn(groups * dim, dtype=dtype),
        delta_bias=torch.randn(groups * dim, dtype=dtype),
    )


def images(batch=2, height=3, width=5, dim=4, rank=2, states=3, routes=4, dtype=torch.float64):
    return dict(
        x=torch.randn(batch, height, width, dim, dtype=dtype),
        x_proj_weight=torch.randn(routes, rank + 2 * states, dim, dtype=dtype) / dim**0.5,
        dt_weight=torch.randn(routes, dim, rank, dtype=dtype) / rank**0.5,
        dt_bias=torch.randn(routes, dim, dtype=dtype),
        A=-torch.rand(routes, dim, states, dtype=dtype) * states - 0.1,
        D=torch.randn(routes, dim, dtype=dtype),
    )


def images_ssd(batch=2, height=3, width=5, heads=2, head_dim=3, states=4, routes=4, dtype=torch.float64):
    return dict(
        x=torch.randn(batch, height, width, heads * head_dim, dtype=dtype),
        x_proj_weight=torch.randn(routes, heads + 2 * states, heads * head_dim, dtype=dtype) / 2,
        dt_bias=torch.randn(routes, heads, dtype=dtype),
        A=-torch.rand(routes, heads, dtype=dtype) * 2 - 0.1,
        D=torch.randn(routes, heads, head_dim, dtype=dtype),
    )


@pytest.mark.parametrize("length", [1, 2, 7, 49, 63, 196, 197, 3136])
@pytest.mark.parametrize("step", [-4.0, 1.0])
def test_scan_agrees_with_the_loop_in_float32(length, step):
    torch.manual_seed(length)
    case = sequences(length=length, step=step)
    assert relative(vk.selective_scan(**case), naive.selective_scan(**case)) < 1e-6


@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("optional", [True, False])
def test_scan_agrees_with_the_loop_in_float64(states, optional):
    torch.manual_seed(states)
    case = sequences(length=23, states=states, dtype=torch.float64)
    if not optional:
        case.update(D=None, delta_bias=None)
    assert relative(vk.selective_scan(**case), naive.selective_scan(**case)) < 1e-14
    case["delta"] = case["delta"].abs()
    expected = naive.selective_scan(**case, delta_softplus=False)
    assert relative(vk.selective_scan(**case, delta_softplus=False), expected) < 1e-14


def test_many_channels_are_scanned_a_few_at_a_time():
    """A scan large enough to be split gives what its channels give alone, gradients included."""
    torch.manual_seed(0)
    length, dim, states = 3136, 100, 16
    leaves = [
        torch.randn(1, dim, length), torch.randn(1, dim, length) - 2, -torch.rand(dim, states) - 0.5,
        torch.randn(1, 1, states, length), torch.randn(1, 1, states, length),
    ]  # fmt: skip
    leaves = [t.requires_grad_() for t in leaves]
    halves = [slice(0, 50), slice(50, dim)]
    parts = [vk.selective_scan(*(t[:, half] for t in leaves[:2]), leaves[2][half], *leaves[3:]) for half in halves]
    results = [vk.selective_scan(*leaves), torch.cat(parts, 1)]
    with torch.no_grad():
        torch.testing.assert_close(vk.selective_scan(*leaves), results[1], rtol=1e-5, atol=1e-5)
    dy = torch.randn(1, dim, length)
    grads = [torch.autograd.grad(y, leaves, dy) for y in results]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_strong_decay_underflows_to_no_memory_and_large_steps_stay_linear():
    torch.manual_seed(0)
    case = sequences(length=50, dtype=torch.float64)
    case["delta"] = torch.full_like(case["delta"], 30.0)
    case["A"] = torch.full_like(case["A"], -1e4)
    case["delta_bias"] = None
    group = case["u"].unflatten(1, (2, 3))
    read = (case["B"] * case["C"]).sum(2)[:, :, None]
    expected = (30.0 * read * group).flatten(1, 2) + case["D"][:, None] * case["u"]
    assert relative(vk.selective_scan(**case), expected) < 1e-14


def test_one_pixel_has_every_gradient():
    torch.manual_seed(0)
    case = images(height=1, width=1)
    inputs = [t.requires_grad_() for t in case.values()]
    gradients = dict(zip(case, torch.autograd.grad(vk.cross_selective_scan(**case).sum(), inputs), strict=True))
    assert gradients["A"].abs().max() == 0  # nothing has decayed yet
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if name != "A")


def test_gradcheck():
    torch.manual_seed(0)
    case = sequences(batch=1, dim=2, length=6, states=2, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in case.values())
    assert torch.autograd.gradcheck(vk.selective_scan, inputs)
    case = images(batch=1, height=2, width=3, dim=2, rank=1, states=2)
    inputs = tuple(t.requires_grad_() for t in case.values())
    assert torch.autograd.gradcheck(vk.cross_selective_scan, inputs)
    case = images_ssd(batch=1, height=2, width=3, head_dim=2, states=2)
    inputs = tuple(t.requires_grad_() for t in case.values())
    assert torch.autograd.gradcheck(lambda *a: vk.cross_ssd(*a, chunk_size=4), inputs)


@pytest.mark.parametrize("routes", [vk.ROUTES, ("col_rev",), ("row", "row", "row_rev"), ("col", "row")])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 5)])
def test_image_operators_agree_with_the_loop_over_pixels(routes, size):
    torch.manual_seed(0)
    height, width = size
    case = images(height=height, width=width, routes=len(routes))
    expected = naive.cross_selective_scan(**case, routes=routes)
    assert relative(vk.cross_selective_scan(**case, routes=routes), expected) < 1e-13
    case = images_ssd(height=height, width=width, routes=len(routes))
    expected = naive.cross_ssd(**case, routes=routes)
    for chunk_size in (1, 4, 64):
        assert relative(vk.cross_ssd(**case, routes=routes, chunk_size=chunk_size), expected) < 1e-13


def test_ssd_keeps_its_digits_behind_a_strong_decay():
    torch.manual_seed(0)
    case = images_ssd(height=8, width=8)
    case["A"] = torch.full_like(case["A"], -300.0)
    expected = naive.cross_ssd(**case, routes=vk.ROUTES)
    single = {name: t.float() for name, t in case.items()}
    assert relative(vk.cross_ssd(**single).double(), expected) < 1e-6


def test_without_bias_and_skip():
    torch.manual_seed(0)
    case = images() | dict(dt_bias=None, D=None)
    assert relative(vk.cross_selective_scan(**case), naive.cross_selective_scan(**case, routes=vk.ROUTES)) < 1e-13
    case = images_ssd() | dict(dt_bias=None, D=None)
    assert relative(vk.cross_ssd(**case), naive.cross_ssd(**case, routes=vk.ROUTES)) < 1e-13


def test_cross_scan_walks_the_routes_and_cross_merge_is_its_adjoint():
    image = torch.arange(6.0).reshape(1, 2, 3, 1)
    walked = vk.cross_scan(image)[0, :, :, 0].tolist()
    assert walked == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 4, 15, 4)
    torch.testing.assert_close((vk.cross_scan(x) * y).sum(), (x * vk.cross_merge(y, 3, 5)).sum())


def test_empty_batch_keeps_its_shape_and_gradient():
    case = {name: t.requires_grad_() for name, t in images(batch=0).items()}
    out = vk.cross_selective_scan(**case)
    assert out.shape == (0, 3, 5, 4)
    out.sum().backward()
    assert case["A"].grad.abs().sum() == 0
    assert vk.cross_ssd(**images_ssd(batch=0)).shape == (0, 3, 5, 6)
    assert vk.selective_scan(**sequences(batch=0)).shape == (0, 6, 7)


def test_strided_inputs():
    torch.manual_seed(0)
    case = images()
    strided = case | dict(x=case["x"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0))
    assert not strided["x"].is_contiguous()
    torch.testing.assert_close(vk.cross_selective_scan(**strided), vk.cross_selective_scan(**case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_the_recurrence_in_float32(dtype):
    torch.manual_seed(0)
    exact = images(height=9, width=9, dtype=torch.float32)
    case = {name: t.to(dtype) if name in ("x", "x_proj_weight", "dt_weight") else t for name, t in exact.items()}
    out = vk.cross_selective_scan(**case)
    assert out.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    rounded = {name: t.double() for name, t in case.items()}
    assert relative(out.double(), vk.cross_selective_scan(**rounded)) < 1e-2
    assert vk.cross_selective_scan(**case, out_dtype=torch.float64).dtype == torch.float64


def test_float16_does_not_overflow():
    case = sequences(length=40, states=1, dtype=torch.float32)
    case |= dict(u=torch.full_like(case["u"], 6e4).half(), B=torch.full_like(case["B"], 100).half())
    case |= dict(C=case["C"].half(), delta=case["delta"].half())
    out = vk.selective_scan(**case)
    assert out.dtype == torch.float32 and out.isfinite().all() and out.abs().max() > 65504


def test_autocast_casts_image_and_projections_only():
    torch.manual_seed(0)
    case = images(dtype=torch.float32)
    rounded = case | {name: case[name].bfloat16() for name in ("x", "x_proj_weight", "dt_weight")}
    expected = vk.cross_selective_scan(**rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vk.cross_selective_scan(**case)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_compile_sees_no_graph_break_at_any_size():
    torch.manual_seed(0)
    compiled = torch.compile(lambda **a: vk.cross_selective_scan(**a), fullgraph=True, backend="eager")
    for height in (3, 4, 7):  # the second size makes it dynamic
        case = images(height=height, dtype=torch.float32)
        torch.testing.assert_close(compiled(**case), vk.cross_selective_scan(**case))
        with torch.no_grad():
            torch.testing.assert_close(compiled(**case), vk.cross_selective_scan(**case))


@pytest.mark.parametrize("states", [1, 3])
def test_without_gradients_the_numbers_are_the_same_and_arguments_stay(states):
    torch.manual_seed(0)
    image = images(height=9, width=7, states=states)
    sequence = sequences(length=50, states=states, dtype=torch.float64) | dict(delta_bias=None, delta_softplus=False)
    for operator, case in ((vk.cross_selective_scan, image), (vk.selective_scan, sequence)):
        expected = operator(**case)
        before = {name: value.clone() for name, value in case.items() if isinstance(value, torch.Tensor)}
        with torch.inference_mode():
            assert torch.equal(operator(**case), expected)
        for name, value in before.items():
            assert torch.equal(case[name], value), name


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(routes=()), "routes is empty"),
        (dict(routes=("row", "col", "diag", "row")), "unknown route 'diag'"),
        (dict(routes=("row",)), "A has shape (4, 4, 3)"),
        (
            dict(dt_weight=torch.zeros(4, 5, 2).double()),
            "dt_weight has shape (4, 5, 2); beside x of shape (2, 3, 5, 4)",
        ),
        (dict(x_proj_weight=torch.zeros(4, 9, 4).double()), "x_proj_weight has shape (4, 9, 4)"),
        (dict(D=torch.zeros(4).double()), "D has shape (4,)"),
        (
            dict(x=torch.zeros(2, 3, 5)),
            "x has shape (2, 3, 5); it must be (batch, height, width, dim) with at least one pixel",
        ),
        (dict(x=torch.zeros(2, 0, 5, 4)), "x has shape (2, 0, 5, 4)"),
        (dict(x=torch.zeros(2, 3, 5, 4, dtype=torch.int32)), "x is torch.int32"),
        (dict(A=torch.zeros(4, 4, 3, device="meta")), "A is on meta and x on cpu"),
        (dict(out_dtype=torch.int8), "out_dtype is torch.int8"),
    ],
)
def test_errors_name_the_argument(change, words):
    with pytest.raises(ValueError, match="^[^\n]+$") as error:
        vk.cross_selective_scan(**(images() | change))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "operator, states, gradient, expected",
    [
        ("selective_scan", 1, False, "triton"),
        ("selective_scan", 1, True, "cuda"),
        ("selective_scan", 16, False, "cuda"),
        ("cross_selective_scan", 1, False, "cuda"),
    ],
)
def test_the_fastest_backend_serves(monkeypatch, operator, states, gradient, expected):
    """By docs/kernels.md, where every backend can."""
    monkeypatch.setattr(vk.registry, "why_not", lambda name, call: None)
    call = vk.Call(operator, torch.device("cuda"), torch.float32, torch.float32, states=states, gradient=gradient)
    assert vk.choose(call) == expected


def test_registry_answers_who_serves_and_why_not():
    call = vk.Call("cross_selective_scan", torch.device("cpu"), torch.float64, torch.float64)
    assert vk.choose(call) == "reference" == vk.choose(call, "auto")
    reasons = vk.explain(call)
    assert reasons["reference"] is None and all(reasons[name] for name in ("cuda", "triton", "mamba_ssm"))
    with pytest.raises(vk.BackendError, match="unknown backend 'refrence'; did you mean 'reference'"):
        vk.cross_selective_scan(**images(), backend="refrence")
    with pytest.raises(vk.BackendError, match="backend 'cuda' cannot serve cross_selective_scan here: "):
        vk.cross_selective_scan(**images(), backend="cuda")
    assert "reference" in vk.backends() and "reference" in vk.backends("cross_ssd")


def test_the_wider_of_two_dtypes_is_what_pytorch_promotes_them_to():
    from vmamba_kernels.operators import FLOATS

    for one in FLOATS:
        for other in FLOATS:
            assert vk.wider(one, other) == torch.promote_types(one, other)
