"""The CUDA kernels' numbers on an emulated GPU, against float64, and how PyTorch sees the operators.

Compiling them, and what is around them, is in test_cuda.py; on a real GPU they run in test_gpu.py.
"""

import functools
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba_kernels import cross_selective_scan, dispatch, reference
from vmamba_kernels.cuda import operator as operator_module
from vmamba_kernels.cuda.cross_selective_scan import KINDS
from vmamba_kernels.ends import extended

from . import cuda_emulator
from .cuda_emulator import convolutions, mlps, norms, operators, sequences, sums

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the kernels on a CPU")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Where the kernels for an emulated GPU lie, which several tests share."""
    return tmp_path_factory.mktemp("emulated")


def _install(monkeypatch, folder, processors=1):
    cuda_emulator.install(monkeypatch, folder, processors)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(operator_module, "make_current", lambda index: None)
    for module in (operators, sequences):
        module._scan.cache_clear()  # of what another emulator has loaded
        for operator in (module.FORWARD, module.BACKWARD):
            _on_cpu_tensors(operator)
    for module in (norms, convolutions, mlps):
        module._kernels.cache_clear()
        for operator in (module.FORWARD, module.BACKWARD):
            _on_cpu_tensors(operator)
    for operator in (norms.ADD_FORWARD, norms.ADD_BACKWARD):
        _on_cpu_tensors(operator)


@functools.cache  # once a process: the dispatcher keeps it
def _on_cpu_tensors(operator):
    dispatch.LIBRARY.impl(operator._operator._opname, operator._on_its_device, "CPU")


@needs_compiler
@pytest.mark.parametrize("batch, size, dim, states, rank, dtype, routes, extras, processors", [
    (1, (5, 9), 40, 1, 6, BF16, ("row", "col", "row_rev", "col_rev"), True, 1),
    (1, (9, 11), 20, 16, 12, BF16, ("col", "row_rev"), True, 100),
    (1, (5, 13), 9, 16, 12, BF16, ("row", "col_rev"), True, 1),
    (2, (8, 9), 12, 10, 5, BF16, ("row", "col_rev"), True, 1),
    (2, (5, 4), 3, 5, 3, F32, ("col_rev", "row"), False, 100),
    (1, (3, 7), 64, 2, 9, F16, ("row", "col_rev"), True, 1),
])  # fmt: skip
def test_numbers_on_an_emulated_gpu(
    emulated, monkeypatch, batch, size, dim, states, rank, dtype, routes, extras, processors
):
    """Output and every gradient against the float64 reference; with many `processors` the routes are cut up."""
    _install(monkeypatch, emulated, processors)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    count, out_dtype = len(routes), F32 if dtype == F16 else dtype
    tensors = [
        normal(batch, *size, dim).to(dtype),
        (normal(count, rank + 2 * states, dim) / dim**0.5).to(dtype),
        (0.5 * normal(count, dim, rank) / rank**0.5).to(dtype),
        normal(count, dim) - 3 if extras else None,
        -torch.exp(0.5 * normal(count, dim, states) + 1),
        normal(count, dim) if extras else None,
    ]
    grad, kinds = normal(batch, *size, dim).to(out_dtype), sum(KINDS[route] << 2 * i for i, route in enumerate(routes))
    out, borders, packed, skip = operators.FORWARD(*tensors, kinds, out_dtype, True)
    x, _, dt_weight, dt_bias, A, _ = tensors
    got = operators.BACKWARD(grad, x, packed, dt_weight, dt_bias, A, skip, borders, kinds)

    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    want = cross_selective_scan(*leaves, routes=routes, backend="reference")
    wanted = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], grad.double()))
    bound = 1e-2 if dtype == BF16 else 2e-3 if dtype == F16 else 1e-6 * (size[0] * size[1]) ** 0.5
    assert (out - want).norm() <= bound * want.norm()
    for mine, leaf in zip(got, leaves, strict=True):
        if leaf is not None:
            expected = next(wanted)
            assert (mine - expected).norm() <= bound * expected.norm()


@pytest.fixture
def on_a_cpu(emulated, monkeypatch):
    """The operators take CPU tensors, through the emulated GPU."""
    _install(monkeypatch, emulated)


def _leaves(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def _image_leaves():
    """Arguments of cross_selective_scan."""
    leaves = _leaves((1, 3, 4, 8), (4, 3 + 4, 8), (4, 8, 3), (4, 8), (4, 8, 2), (4, 8))
    leaves[4] = (-leaves[4].detach().exp()).requires_grad_()
    return leaves


@needs_compiler
def test_opcheck(on_a_cpu):
    inputs = _image_leaves()
    for left_out in ((), (3, 5)):  # step bias and D
        given = [None if i in left_out else t for i, t in enumerate(inputs)]
        results = torch.library.opcheck(torch.ops.vmamba.cross_selective_scan_cuda, (*given, 0b11100100, F32, True))
        assert set(results.values()) == {"SUCCESS"}
    inputs = _leaves((1, 6, 9), (1, 6, 9), (6, 2), (1, 2, 2, 9), (1, 2, 2, 9), (6,), (6,))
    inputs[2] = (-inputs[2].detach().exp()).requires_grad_()
    results = torch.library.opcheck(torch.ops.vmamba.selective_scan_cuda, (*inputs, True, F32, True))
    assert set(results.values()) == {"SUCCESS"}


@needs_compiler
@pytest.mark.parametrize("batch, groups, dim, length, states, dtype, softplus, extras, turned", [
    (2, 2, 3, 30, 5, F32, True, True, False),
    (2, 1, 6, 30, 5, F32, False, False, True),
    (2, 3, 24, 67, 1, BF16, True, True, False),
    (1, 1, 136, 132, 1, BF16, True, True, False),
    (1, 2, 4, 130, 16, F16, True, True, True),
])  # fmt: skip
def test_selective_scan_on_an_emulated_gpu(
    on_a_cpu, batch, groups, dim, length, states, dtype, softplus, extras, turned
):
    """Output and every gradient against float64; turned: u, delta and the gradient lie in memory channels last."""
    u, delta, A, B, C, D, bias, grad = _leaves(
        *[(batch, groups * dim, length)] * 2, (groups * dim, states), *[(batch, groups, states, length)] * 2,
        *[(groups * dim,)] * 2, (batch, groups * dim, length),
    )  # fmt: skip
    out_dtype = F32 if dtype == F16 else dtype
    low = [t.detach().to(dtype) for t in (u, delta - 2 if softplus else 0.1 * delta.abs(), B, C)]
    leaves = [*low[:2], -A.detach().exp(), *low[2:], D.detach(), bias.detach()][: 7 if extras else 5]
    results = []
    for cast, function, kind in (
        (lambda t: t, sequences.selective_scan, out_dtype),
        (torch.Tensor.double, reference.selective_scan, torch.float64),
    ):
        here = [cast(t) for t in leaves]
        dy = grad.detach().to(out_dtype).to(kind)
        if turned:
            here[:2], dy = [t.mT.contiguous().mT for t in here[:2]], dy.mT.contiguous().mT
        here = [t.requires_grad_() for t in here]
        out = function(*here, *[None] * (7 - len(here)), softplus, kind)
        results.append([out, *torch.autograd.grad(out, here, dy)])
    bound = {BF16: 1e-2, F16: 2e-3, F32: 1e-6 * length**0.5}[dtype]
    for got, want in zip(*results, strict=True):
        assert got.is_contiguous() and (got - want).norm() <= bound * want.norm()


@needs_compiler
def test_states_before_and_behind_on_an_emulated_gpu(on_a_cpu):
    """The longer scan that `selective_scan` makes of a sequence with states, against the reference in float64."""
    u, delta, A, B, C, state = (
        t.detach() for t in _leaves((2, 6, 30), (2, 6, 30), (6, 5), *[(2, 2, 5, 30)] * 2, (2, 6, 5))
    )
    leaves = [u, 0.1 * delta.abs(), -A.exp(), B, C, state]
    results = []
    for scan_of, kind in ((sequences.selective_scan, F32), (reference.selective_scan, torch.float64)):
        here = [t.to(kind).requires_grad_() for t in leaves]
        out = scan_of(*extended(*here, with_last=True), None, None, False, kind)[..., 5:]
        results.append([out, *torch.autograd.grad(out.square().sum(), here)])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@needs_compiler
def test_modes_see_operators_and_get_the_same_bits(on_a_cpu):
    """A call goes to the function when nothing watches, and through the dispatcher when a mode does."""
    leaves = _image_leaves()

    def run():
        out = operators.cross_selective_scan(*leaves, ("row", "col", "row_rev", "col_rev"), F32)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    alone = run()
    assert type(alone[0].grad_fn).__name__ == "cross_selective_scan_cudaBackward"
    with _Watch() as watch:
        watched = run()
    names = [name for name in watch.seen if name.startswith("vmamba")]
    assert names == ["vmamba::cross_selective_scan_cuda", "vmamba::cross_selective_scan_bwd_cuda"]
    for a, b in zip(alone, watched, strict=True):
        assert torch.equal(a, b)


@needs_compiler
def test_torch_compile_sees_one_node(on_a_cpu):
    leaves = _image_leaves()
    graphs = []

    def scan(*inputs):
        return operators.cross_selective_scan(*inputs, ("row", "col", "row_rev", "col_rev"), F32)

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    out = torch.compile(scan, fullgraph=True, backend=backend)(*leaves)
    assert len(graphs) == 1 and graphs[0][0] == "vmamba.cross_selective_scan_cuda.default"
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager", dynamic=True)(*leaves)
    for got in (out, compiled):
        assert torch.equal(got, scan(*leaves))
        want = torch.autograd.grad(scan(*leaves), leaves, torch.ones_like(out))
        for a, b in zip(torch.autograd.grad(got, leaves, torch.ones_like(out)), want, strict=True):
            assert torch.equal(a, b)


@needs_compiler
def test_what_is_no_plain_tensor_goes_through_the_dispatcher(on_a_cpu):
    inputs = [t.detach() for t in _image_leaves()]
    want = operators.FORWARD(*inputs, 0b11100100, F32, False)[0]
    negated = torch.complex(torch.zeros(1, 3, 4, 8), -inputs[0]).conj().imag  # lazily
    assert negated.is_neg() and torch.equal(operators.FORWARD(negated, *inputs[1:], 0b11100100, F32, False)[0], want)


@needs_compiler
def test_second_derivatives_are_refused(on_a_cpu):
    leaves = _image_leaves()
    out = operators.cross_selective_scan(*leaves, ("row", "col", "row_rev", "col_rev"), F32)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; backend 'reference' has"):
        gradient.sum().backward()


@needs_compiler
@pytest.mark.parametrize("shape, dtype, branch_dtype, out_dtype, drops", [
    ((3, 2, 5, 96), F32, BF16, BF16, True),
    ((2, 3, 7, 200), F32, F32, F32, False),
    ((2, 11, 3), BF16, BF16, F32, True),
    ((1, 3, 300), F32, F16, F16, True),
    ((5, 1), F32, F32, BF16, False),
])  # fmt: skip
def test_norms_on_an_emulated_gpu(on_a_cpu, shape, dtype, branch_dtype, out_dtype, drops):
    """Both norms, output and every gradient, against float64."""
    x, branch, weight, bias, d_sum, dy = _leaves(shape, shape, shape[-1:], shape[-1:], shape, shape)
    leaves = [x.detach().to(dtype), branch.detach().to(branch_dtype), weight.detach(), bias.detach()]
    factor = torch.arange(shape[0]).to(branch_dtype) * 1.25 if drops else None
    d_sum, dy = d_sum.detach().to(dtype), dy.detach().to(out_dtype)
    for adds in (False, True):
        results = []
        for cast, module, kind in ((lambda t: t, norms, out_dtype), (torch.Tensor.double, reference, torch.float64)):
            x, branch, weight, bias = here = [cast(t).requires_grad_() for t in leaves]
            if adds:
                its_factor = None if factor is None else cast(factor)
                out = module.add_layer_norm(x, branch, its_factor, weight, bias, 1e-5, kind)
                results.append([*out, *torch.autograd.grad(out, here, [cast(d_sum), dy.to(kind)])])
            else:
                out = module.layer_norm(x, weight, bias, 1e-5, kind)
                results.append([out, *torch.autograd.grad(out, (x, weight, bias), dy.to(kind))])
        bound = 1e-6 if {dtype, branch_dtype, out_dtype} == {F32} else 1e-2
        for got, want in zip(*results, strict=True):
            assert got.is_contiguous() and (got - want).norm() <= bound * want.norm().clamp(min=1e-3)


@needs_compiler
@pytest.mark.parametrize("rows, shape", [(1, (5,)), (100, (2, 33)), (31, (64,)), (0, (2, 3))])
def test_partial_sums_on_an_emulated_gpu(on_a_cpu, rows, shape):
    partial = torch.arange(rows * torch.Size(shape).numel(), dtype=F32).view(rows, *shape)
    assert torch.equal(sums.sum_rows(partial), partial.sum(0))  # whole numbers


@needs_compiler
def test_opcheck_of_the_norm_of_a_sum(on_a_cpu):
    x, branch, weight, bias = _leaves((2, 3, 5), (2, 3, 5), (5,), (5,))
    for factor in (None, torch.tensor([0.0, 1.5])):
        results = torch.library.opcheck(
            torch.ops.vmamba.add_layer_norm_cuda, (x, branch, factor, weight, bias, 1e-5, F32)
        )
        assert set(results.values()) == {"SUCCESS"}
    assert norms.add_layer_norm(x[:0], branch[:0], None, weight, bias, 1e-5, F32)[1].shape == (0, 3, 5)


@needs_compiler
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape, dtype, has_bias", [
    ((2, 5, 21, 32), F32, True),
    ((1, 7, 7, 200), BF16, False),
    ((2, 1, 1, 6), F16, True),
    ((1, 4, 40, 3), BF16, True),
    ((3, 3, 2, 1), F32, False),
])  # fmt: skip
def test_depthwise_convolutions_on_an_emulated_gpu(on_a_cpu, monkeypatch, shape, dtype, has_bias, silu):
    """Output and every gradient against float64, with strips of four columns and of sixteen."""
    x, weight, bias, dy = (t.detach() for t in _leaves(shape, (shape[-1], 1, 3, 3), shape[-1:], shape))
    leaves = [x.to(dtype), weight, *([bias] if has_bias else [])]
    exact = [t.double().requires_grad_() for t in leaves]
    out = reference.depthwise_conv(*exact, *([] if has_bias else [None]), silu, True)
    want = [out, *torch.autograd.grad(out, exact, dy.to(dtype).double())]
    for columns in (4, 16):
        monkeypatch.setattr(convolutions, "_columns", lambda x, n=columns: n)
        here = [t.clone().requires_grad_() for t in leaves]
        out = convolutions.depthwise_conv(*here, *([] if has_bias else [None]), silu, True)
        assert torch.equal(out, convolutions.depthwise_conv(*leaves, *([] if has_bias else [None]), silu, False))
        got = [out, *torch.autograd.grad(out, here, dy.to(dtype))]
        for one, other in zip(got, want, strict=True):
            assert one.is_contiguous()
            assert (one - other).norm() <= (1e-6 if dtype == F32 else 1e-2) * other.norm()


@needs_compiler
def test_opcheck_of_a_depthwise_convolution(on_a_cpu):
    x, weight, bias = _leaves((2, 3, 5, 4), (4, 1, 3, 3), (4,))
    for arguments in ((bias, True, True), (None, False, False)):
        results = torch.library.opcheck(torch.ops.vmamba.depthwise_conv_cuda, (x, weight, *arguments))
        assert set(results.values()) == {"SUCCESS"}
    assert convolutions.depthwise_conv(x[:0], weight, None, True, True).shape == (0, 3, 5, 4)


@needs_compiler
@pytest.mark.parametrize("shape, hidden, out, dtype", [
    ((2, 3, 5, 16), 64, 16, F32),
    ((700, 12), 200, 10, BF16),
    ((9, 8), 48, 24, F16),
    ((3, 4), 7, 3, F32),
])  # fmt: skip
def test_mlps_on_an_emulated_gpu(on_a_cpu, shape, hidden, out, dtype):
    """Output and every gradient against float64; without a backward pass the same output."""
    dim = shape[-1]
    leaves = [t.detach() for t in _leaves(shape, (hidden, dim), (hidden,), (out, hidden), (out,))]
    leaves = [(t / t.shape[-1] ** 0.5 if t.dim() == 2 and t is not leaves[0] else 2 * t).to(dtype) for t in leaves]
    (dy,) = _leaves((*shape[:-1], out))
    exact, here = ([t.to(kind).requires_grad_() for t in leaves] for kind in (torch.float64, dtype))
    want = reference.gelu_mlp(*exact, True)
    got = mlps.gelu_mlp(*here, True)
    assert got.shape == want.shape and torch.equal(got, mlps.gelu_mlp(*leaves, False))
    want = [want, *torch.autograd.grad(want, exact, dy.detach().to(dtype).double())]
    got = [got, *torch.autograd.grad(got, here, dy.detach().to(dtype))]
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        assert (one - other).norm() <= (1e-6 if dtype == F32 else 1e-2) * other.norm()


@needs_compiler
def test_opcheck_of_an_mlp(on_a_cpu):
    leaves = _leaves((2, 3, 4), (8, 4), (8,), (4, 8), (4,))
    for keep in (True, False):
        inputs = leaves if keep else [t.detach() for t in leaves]
        assert set(torch.library.opcheck(torch.ops.vmamba.gelu_mlp_cuda, (*inputs, keep)).values()) == {"SUCCESS"}
    empty = [leaves[0][:0].detach().requires_grad_(), *leaves[1:]]
    out = mlps.gelu_mlp(*empty, True)
    gradients = torch.autograd.grad(out.sum(), leaves[1:])
    assert out.shape == (0, 3, 4) and not any(g.count_nonzero() for g in gradients)
