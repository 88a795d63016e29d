"""The operators on a GPU, every backend on the same cases: against the float64 reference."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vmamba_kernels import BackendError, add_layer_norm, cross_selective_scan, cross_ssd, selective_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BACKENDS = ("cuda", "triton")
ROUTES = ("row", "col", "row_rev", "col_rev")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TINY = 1e-30  # what float32 cannot hold, or only in part, counts as zero
NAMES = ("out", "x", "x_proj_weight", "dt_weight", "dt_bias", "A", "D")

FACTORS = {
    "states": (1, 2, 4, 8, 16, 64),
    "rank": (1, 6, 24, 48),
    "dim": (1, 3, 96, 100, 768),
    "size": ((1, 1), (1, 7), (7, 1), (5, 9), (14, 14), (56, 56), (57, 33)),
    "batch": (1, 3, 0),
    "dtype": (F32, BF16, F16),
    "routes": (ROUTES, ("row",), ("col", "row_rev"), ("col_rev", "col_rev", "row")),
    "skip": (True, False),
    "bias": (True, False),
    "out_dtype": (None, F32),
}


def fits(case: dict) -> bool:
    """Small enough for the reference; what is not chosen yet counts as its smallest value."""
    height, width = case.get("size", (1, 1))
    return case.get("batch", 1) * height * width * case.get("dim", 1) * case.get("states", 1) <= 4e7


def pairwise() -> list[dict]:
    """Cases in which every two values of two factors meet, if they fit: greedy, the uncovered pair first."""
    names = list(FACTORS)
    uncovered = [
        {a: u, b: v}
        for a, b in combinations(names, 2)
        for u, v in product(FACTORS[a], FACTORS[b])
        if fits({a: u, b: v})
    ]
    cases = []
    while uncovered:
        case = dict(uncovered[0])
        for name in names:
            if name not in case:
                choices = [{**case, name: value} for value in FACTORS[name]]
                case = max(filter(fits, choices), key=lambda choice: len(covered(choice, uncovered)))
        cases.append(case)
        done = covered(case, uncovered)
        uncovered = [pair for pair in uncovered if pair not in done]
    return cases


def covered(case: dict, pairs: list[dict]) -> list[dict]:
    return [pair for pair in pairs if all(name in case and case[name] == value for name, value in pair.items())]


def make(batch, size, dim, states, rank, dtype, routes=ROUTES, skip=True, bias=True, seed=0, device="cuda"):
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    count = len(routes)
    tensors = (
        normal(batch, *size, dim).to(dtype),
        (normal(count, rank + 2 * states, dim) / math.sqrt(dim)).to(dtype),
        (0.5 * normal(count, dim, rank) / math.sqrt(rank)).to(dtype),
        5 * torch.rand(count, dim, generator=generator, device=device) - 6 if bias else None,
        -torch.exp(0.5 * normal(count, dim, states) + 1),
        normal(count, dim) if skip else None,
    )
    return [None if t is None else t.requires_grad_() for t in tensors]


def run(tensors, backend, routes=ROUTES, out_dtype=None, grad=None, double=False):
    """Output and gradients (None for what is not there)."""
    tensors = [None if t is None else (t.double() if double else t).detach().requires_grad_() for t in tensors]
    out = cross_selective_scan(*tensors, routes=routes, out_dtype=None if double else out_dtype, backend=backend)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    here = [t for t in tensors if t is not None]
    grads = iter(torch.autograd.grad(out, here, grad.to(out.dtype)))
    return [out.detach()] + [None if t is None else next(grads) for t in tensors]


def errors(got, want):
    """name -> |got - want| / |want|, of what is there."""
    result = {}
    for name, a, b in zip(NAMES, got, want, strict=True):
        if b is not None and b.numel():
            norm = b.double().norm()
            result[name] = float((a.double() - b.double()).norm() / (norm if norm > TINY else 1))
    return result


def check(tensors, backend, routes=ROUTES, out_dtype=None, grad=None, conditioning=0.0):
    """Against the float64 reference: 1e-6 sqrt(length) in float32; in the half types 1e-2, or half as much again as
    plain PyTorch in the same types where that is worse (few values, much cancellation).  conditioning: how much A's
    gradient, which is as large as the decays, magnifies float32's rounding of their exponents."""
    x = tensors[0]
    if grad is None:
        grad = torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        grad = grad.to(out_dtype or (F32 if x.dtype == F16 else x.dtype))
    want = run(tensors, "reference", routes, grad=grad, double=True)
    got = run(tensors, backend, routes, out_dtype, grad)
    found = errors(got, want)
    if x.dtype == F32:
        bounds = dict.fromkeys(found, 1e-6 * math.sqrt(x.shape[1] * x.shape[2]))
        bounds["A"] += conditioning * 2**-24
    else:
        plain = errors(run(tensors, "reference", routes, out_dtype, grad), want)
        bounds = {name: max(1e-2, 1.5 * plain[name]) for name in found}
    wrong = {name: (value, bounds[name]) for name, value in found.items() if not value <= bounds[name]}
    assert not wrong, wrong
    assert got[0].dtype == (out_dtype or (F32 if x.dtype == F16 else x.dtype))
    for a, t in zip(got[1:], tensors, strict=True):
        assert t is None or (a.shape == t.shape and a.dtype == t.dtype)


@pytest.fixture(params=BACKENDS)
def backend(request):
    try:
        cross_selective_scan(*make(1, (1, 1), 8, 1, 1, F32), backend=request.param)
    except BackendError as error:
        pytest.skip(str(error))
    return request.param


def _id(case: dict) -> str:
    height, width = case["size"]
    dtype = str(case["dtype"])[6:]
    return f"N{case['states']}-R{case['rank']}-D{case['dim']}-{height}x{width}-B{case['batch']}-{dtype}"


@pytest.mark.parametrize("case", pairwise(), ids=_id)
def test_output_and_gradients(backend, case):
    case = dict(case)
    out_dtype = case.pop("out_dtype")
    check(make(**case), backend, case["routes"], out_dtype)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("groups, dim, length, states, dtype, softplus, extras", [
    (2, 24, 50, 16, F32, True, True),
    (1, 3, 130, 5, F32, False, False),
    (4, 40, 300, 1, BF16, True, True),
    (1, 64, 64, 64, F16, True, False),
])  # fmt: skip
def test_selective_scan(backend, batch, groups, dim, length, states, dtype, softplus, extras):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    channels = groups * dim
    u, grad = normal(batch, channels, length).to(dtype), normal(batch, channels, length)
    delta = 0.5 * normal(batch, channels, length) - 2 if softplus else 0.1 * normal(batch, channels, length).abs()
    B, C = (normal(batch, groups, states, length).to(dtype) for _ in range(2))
    tensors = [u, delta.to(dtype), -torch.exp(0.5 * normal(channels, states)), B, C, *(
        (normal(channels), normal(channels) * 0.5 - 1) if extras else (None, None)
    )]  # fmt: skip
    results = []
    for name in ("reference", backend):
        leaves = [
            None if t is None else (t.double() if name == "reference" else t).detach().requires_grad_() for t in tensors
        ]
        out = selective_scan(*leaves, delta_softplus=softplus, backend=name)
        here = [t for t in leaves if t is not None]
        results.append([out, *torch.autograd.grad(out, here, grad.to(out.dtype))])
    bound = 1e-6 * math.sqrt(length) if dtype == F32 else 1e-2
    for want, got in zip(*results, strict=True):
        assert want.shape == got.shape
        if want.numel():
            assert (got.double() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ssd_at_a_models_shape(dtype):
    """64 states and heads of 16 channels, as in the `m2` models: not the matrix instructions of small ones."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    x, weight, bias = normal(2, 20, 20, 96), normal(4, 6 + 2 * 64, 96) / math.sqrt(96), normal(4, 6) - 3
    A, D, grad = -torch.exp(0.5 * normal(4, 6)), normal(4, 6, 16), normal(2, 20, 20, 96)
    inputs = [x.to(dtype), weight.to(dtype), bias, A, D]
    found = {}
    for backend in ("triton", "reference"):
        tensors = [t.to(torch.float64 if backend == "reference" else t.dtype).requires_grad_() for t in inputs]
        out = cross_ssd(*tensors, backend=backend)
        found[backend] = [out.detach(), *torch.autograd.grad(out, tensors, grad.to(dtype).to(out.dtype))]
    for got, want in zip(found["triton"], found["reference"], strict=True):
        bound = 1e-6 * math.sqrt(400) if dtype == F32 else 1e-2
        assert float((got - want).norm() / want.norm()) < bound


def test_strides(backend):
    """Transposed, expanded and misaligned inputs and gradients give what contiguous ones give."""
    tensors = make(2, (6, 8), 32, 4, 3, F32)
    x = tensors[0].detach().transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.randn(2, 1, 8, 1, device="cuda").expand(2, 6, 8, 32)
    strided = [x, *tensors[1:]]
    strided[3] = tensors[3].detach()[:, :1].expand(4, 32)
    tensors[3] = strided[3].contiguous()
    padded = torch.zeros(tensors[1].numel() + 1, device="cuda")[1:].view_as(tensors[1])
    strided[1] = padded.copy_(tensors[1].detach())
    for a, b in zip(run(strided, backend, grad=grad), run(tensors, backend, grad=grad.contiguous()), strict=True):
        assert torch.equal(a, b)
    assert tensors[1].detach().data_ptr() % 16 == 0 and padded.data_ptr() % 16 != 0


@pytest.mark.parametrize("shift", [19.9, 20.1, 60.0, -20.0, -60.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_steps_far_from_zero(backend, shift, dtype):
    tensors = make(1, (7, 9), 32, 4, 6, dtype, skip=False)
    tensors[3] = tensors[3].detach() * 0 + shift
    if shift < 0:  # float32 holds them, so the scan must
        tensors[4] = tensors[4].detach() * 1e3
    check(tensors, backend, conditioning=4 * abs(shift))  # a step's relative error is that of dt + bias, absolutely


def test_decay_underflows(backend):
    """|A| delta of 1e4 and more: the state is forgotten at once."""
    tensors = make(1, (7, 9), 32, 4, 6, F32)
    tensors[4] = tensors[4].detach() * 1e5
    # What is left of A's gradient are decays near exp(-87), from steps near exp(-12).
    check(tensors, backend, conditioning=87 * 12)


def test_float16_does_not_overflow(backend):
    """Projections and sums far beyond 65504, from float16 pixels."""
    tensors = make(1, (8, 8), 64, 4, 4, F16)
    tensors[0] = (tensors[0].detach().float() * 100).half()
    tensors[1] = (tensors[1].detach().float() * 300).half()
    tensors[2] = (tensors[2].detach().float() * 1e-4).half()
    grad = torch.randn(1, 8, 8, 64, device="cuda") * 1e-6
    out = run(tensors, backend, grad=grad)
    want = run(tensors, "reference", grad=grad, double=True)
    assert want[0].abs().max() > 65504 and torch.isfinite(out[0]).all()
    assert errors(out, want)["out"] < 1e-2 and errors(out, want)["A"] < 1e-2


def test_same_bits_twice(backend):
    tensors = make(3, (20, 20), 96, 16, 6, BF16)
    for a, b in zip(run(tensors, backend), run(tensors, backend), strict=True):
        assert torch.equal(a, b)


def test_long_route_of_one_image(backend):
    """A single large image, where the route is cut up to fill the GPU."""
    check(make(1, (96, 128), 16, 4, 6, F32), backend)
    check(make(1, (100, 77), 32, 1, 6, BF16), backend)


@pytest.mark.parametrize("batch, dim, states", [(86, 96, 1), (129, 192, 16)])
def test_past_2_to_31_elements(backend, batch, dim, states):
    """The last of many images is as it is alone: route outputs hold more than 2^31 numbers, with 16 states the
    gradients of B and C too, by blocks of channels."""
    size = 256, 256
    assert batch * size[0] * size[1] * dim * 4 > 2**31
    if torch.cuda.get_device_properties(0).total_memory < 75e9:
        pytest.skip("needs a GPU of 75 GB")
    tensors = make(1, size, dim, states, 6, BF16)
    few = run(tensors, backend)
    grad = torch.randn((1, *size, dim), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    x = tensors[0].detach().expand(batch, *size, dim)
    many = run([x, *tensors[1:]], backend, grad=grad.expand(batch, *size, dim))
    last = [many[0][-1:], many[1][-1:]] + [None if t is None else t.double() / batch for t in many[2:]]
    assert all(value < 5e-3 for value in errors(last, few).values()), errors(last, few)


def test_sequences_past_2_to_31_elements(backend):
    """The end of many long channels, where what came long before is forgotten, is as it is alone."""
    channels, length, alone = 1024, (1 << 21) + 128, 1024
    if torch.cuda.get_device_properties(0).total_memory < 75e9:
        pytest.skip("needs a GPU of 75 GB")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=BF16)

    A = -1 - torch.rand(channels, 1, generator=generator, device="cuda")
    u, delta, B, C = (normal(1, *shape, length) for shape in ((channels,), (channels,), (1, 1), (1, 1)))
    out = selective_scan(u, delta, A, B, C, backend=backend)[..., -128:]
    u, delta, B, C = (t[..., -alone:].contiguous() for t in (u, delta, B, C))
    want = selective_scan(u, delta, A, B, C, backend="reference")[..., -128:]
    assert (out - want).norm() < 1e-2 * want.norm()


def test_second_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = make(1, (6, 6), 32, 4, 3, F32)
    there = [t.detach().to("cuda:1").requires_grad_() for t in tensors]
    out = cross_selective_scan(*there, backend=backend)
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.to("cuda:0"), cross_selective_scan(*tensors, backend=backend))


def test_from_a_new_thread(backend):
    """Which has no CUDA context yet, as PyTorch's backward threads at their start."""
    tensors = make(1, (6, 6), 32, 4, 3, F32)
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(cross_selective_scan, *tensors, backend=backend).result()
    assert torch.equal(out, cross_selective_scan(*tensors, backend=backend))


def test_cuda_graph(backend):
    tensors = make(2, (14, 14), 64, 16, 4, BF16)
    out, *grads = run(tensors, backend)
    static = [t.detach().clone().requires_grad_() for t in tensors]
    grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out.dtype)

    def step():
        y = cross_selective_scan(*static, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, static, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    for a, b in zip(captured, [out, *grads], strict=True):
        assert torch.equal(a, b)


def test_compile_as_cuda_graphs(backend):
    """What torch.compile(mode="reduce-overhead") records, forward and backward, gives eager mode's numbers again."""
    from torch._dynamo.utils import counters

    compiled = torch.compile(
        lambda *inputs: cross_selective_scan(*inputs, backend=backend), mode="reduce-overhead", fullgraph=True
    )
    for seed in range(4):  # warm-up, recording, replay, replay
        tensors = make(2, (6, 7), 32, 4, 3, BF16, seed=seed)
        grad = torch.randn(2, 6, 7, 32, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(BF16)
        out = compiled(*tensors)
        found = [out.detach().clone(), *torch.autograd.grad(out, tensors, grad)]
        for got, want in zip(found, run(tensors, backend, grad=grad), strict=True):
            torch.testing.assert_close(got, want)
    assert not counters["inductor"]["cudagraph_skips"]


def test_what_torch_compile_records_without_a_backend_is_cuda():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(cross_selective_scan, backend=keep)(*make(2, (5, 9), 32, 4, 3, F32))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "vmamba.cross_selective_scan_cuda.default" in called, called


def test_compile_and_autocast(backend):
    """No graph break, and under autocast the projections take its dtype."""
    tensors = make(2, (5, 9), 32, 4, 3, F32)

    def step(*inputs):
        return cross_selective_scan(*inputs, backend=backend) * 2

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), step(*tensors))
    grad = torch.ones(2, 5, 9, 32, device="cuda")
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors), tensors, grad),
        torch.autograd.grad(step(*tensors), tensors, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.autocast("cuda", BF16):
        out = step(*tensors)
    assert out.dtype == BF16
    assert (out.float() - step(*tensors)).norm() < 1e-2 * out.float().norm()


def test_opcheck(backend):
    for skip, bias, dtype in ((True, True, F32), (False, False, BF16)):
        tensors = make(1, (5, 3), 8, 2, 3, dtype, skip=skip, bias=bias)
        assert set(torch.library.opcheck(_recorded(tensors, backend)[0], _recorded(tensors, backend)[1]).values()) == {
            "SUCCESS"
        }


def _recorded(tensors, backend):
    """The custom operator that a call reaches, and its arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "vmamba":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        cross_selective_scan(*tensors, backend=backend)
    function, args = calls[0]
    leaves = iter(t for t in tensors if t is not None)
    return function, tuple(next(leaves) if isinstance(a, torch.Tensor) else a for a in args)


def test_used_twice_and_checkpointed(backend):
    tensors = make(1, (6, 6), 16, 4, 3, F32)

    def twice(x, *rest):
        return cross_selective_scan(cross_selective_scan(x, *rest, backend=backend), *rest, backend=backend)

    plain = torch.autograd.grad(twice(*tensors).square().sum(), tensors)
    saved = torch.autograd.grad(checkpoint(twice, *tensors, use_reentrant=False).square().sum(), tensors)
    want = [t.detach().double().requires_grad_() for t in tensors]
    reference = cross_selective_scan(
        cross_selective_scan(want[0], *want[1:], backend="reference"), *want[1:], backend="reference"
    )
    reference = torch.autograd.grad(reference.square().sum(), want)
    for a, b, c in zip(plain, saved, reference, strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm() < 1e-5 * c.norm()


def test_export(backend):
    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return cross_selective_scan(*inputs, backend=backend)

    tensors = [t.detach() for t in make(1, (5, 9), 16, 4, 3, F32)]
    program = torch.export.export(Scan(), tuple(tensors))
    torch.testing.assert_close(program.module()(*tensors), Scan()(*tensors))


def test_what_is_recorded_without_a_backend_is_the_reference():
    """A program runs where nothing of ours is installed."""

    class Scan(torch.nn.Module):
        def forward(self, x, *weights):
            norm = torch.ones(16, device="cuda")
            return add_layer_norm(x, cross_selective_scan(x, *weights), norm, norm)[1]

    tensors = tuple(t.detach() for t in make(1, (5, 9), 16, 4, 3, F32))
    program, traced = torch.export.export(Scan(), tensors), torch.jit.trace(Scan(), tensors)
    assert "ops.vmamba" not in program.graph_module.code and "vmamba::" not in str(traced.inlined_graph)
    torch.testing.assert_close(program.module()(*tensors), Scan()(*tensors), rtol=1e-4, atol=1e-4)
