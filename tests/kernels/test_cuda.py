"""The cuda backend where there is no GPU: its kernels compile, its cache holds, its errors say what to do."""

import contextlib
import functools
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba_kernels import BackendError, choice, cross_selective_scan, dispatch, reference
from vmamba_kernels.cuda import compiler, cubins, why_not
from vmamba_kernels.cuda import operator as operator_module
from vmamba_kernels.cuda.cross_selective_scan import KINDS
from vmamba_kernels.cuda.layout import MAX_RANK, MAX_STATES, Layout
from vmamba_kernels.cuda.scan import Geometry, Scan
from vmamba_kernels.ends import extended
from vmamba_kernels.registry import Call

from . import cuda_emulator
from .cuda_emulator import convolutions, norms, operators, sequences, sums

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}  # bytes of a block
LAYOUTS = [
    Layout(1, 6, 96, BF16, BF16),
    Layout(16, 12, 192, BF16, BF16),
    Layout(5, 0, 33, F16, F32, softplus=False),
]


def _files(layout: Layout, shared: int) -> list[tuple[str, dict, tuple[str, ...]]]:
    backward = layout.bwd_macros(layout.bwd_warps(shared))
    return [
        ("scan_fwd.cu", dict(layout.fwd_macros), ("scan_fwd_kernel", "scan_summary_kernel", "scan_adjoint_kernel")),
        ("scan_bwd.cu", dict(backward), ("scan_bwd_kernel",)),
        ("pixels.cu", dict(layout.pixel_macros), ("merge_fwd_kernel", "merge_bwd_kernel", "pack_kernel")),
        ("sequences.cu", dict(layout.pixel_macros), ("inputs_kernel", "output_kernel", "rows_kernel", "d_rows_kernel")),
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _compile(arch: str, jobs: list[tuple[str, dict, tuple[str, ...]]]) -> None:
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda job: compiler.compile_cubin(job[0], job[1], arch), jobs))
    for cubin, (_, _, names) in zip(cubins, jobs, strict=True):
        assert cubin[:4] == b"\x7fELF"
        assert all(name.encode() in cubin for name in names)


def test_every_kernel_compiles(cache):
    jobs = [job for layout in LAYOUTS for job in _files(layout, SHARED["sm_90"])]
    _compile("sm_90", jobs)
    assert len(list(cache.iterdir())) == len(jobs)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
def test_every_instruction_compiles(cache, arch):
    """The scans of 16 states in bfloat16 have all matrix instructions and asynchronous copies."""
    _compile(arch, _files(LAYOUTS[1], SHARED[arch])[:2])


@pytest.mark.parametrize("states", [1, 2, 3, 4, 5, 8, 16, 17, 33, 64])
@pytest.mark.parametrize("dim", [1, 96, 768])
def test_backward_fits_the_shared_memory(states, dim):
    for shared in SHARED.values():
        for dtype in (F32, BF16):
            layout = Layout(states, 48, dim, dtype, dtype)
            warps = layout.bwd_warps(shared)
            assert layout.bwd_shared(warps) <= shared
            assert layout.chunk % layout.sub_chunk == 0 and layout.chunk % layout.fwd_stage == 0


def test_saved_states_of_16_are_small():
    """x and the border states together are at most 2.5 times x in bfloat16."""
    layout = Layout(16, 12, 192, BF16, BF16)
    for length in (14 * 14, 28 * 28, 56 * 56, 256 * 256):
        saved = math.prod(layout.borders(1, 4, length, save=True)) * layout.border_dtype.itemsize
        assert saved + length * 192 * 2 <= 2.5 * length * 192 * 2


def test_division_by_the_height():
    random.seed(0)
    heights = [
        *range(1, 70),
        2**15 - 1,
        2**15 + 1,
        2**30 + 1,
        2**31 - 1,
        *(random.randrange(1, 2**31) for _ in range(200)),
    ]
    for height in heights:
        division = Geometry(1, height, 1, 1, 0, 1, 0).arguments(1)[-1]
        assert division >> 6 < 2**32
        near = random.randrange(2**31) // height * height
        for step in (0, 1, height - 1, height, near, near - 1, near + height - 1, 2**31 - 1, random.randrange(2**31)):
            if 0 <= step < 2**31:
                assert (step * (division >> 6)) >> (division & 63) == step // height


def test_routes_too_long_to_count_are_refused():
    geometry = Geometry(1, 1, 2**31 - 1, 1, 0, 1, 0)
    with pytest.raises(BackendError, match=r"up to 2,147,482,624 positions, not 2,147,483,647; cut it, or take"):
        Scan(LAYOUTS[0], geometry, torch.device("cuda:0"))


SMALL = ("pixels.cu", dict(LAYOUTS[0].pixel_macros), "sm_90")


@pytest.fixture
def compiled(monkeypatch):
    """Nothing is compiled really; how often something is."""
    compilations = []
    monkeypatch.setattr(compiler, "_nvrtc", lambda *job: compilations.append(job) or b"cubin")
    cubins._warn.cache_clear()
    yield compilations
    cubins._warn.cache_clear()


def test_cache_is_used_and_mends_itself(cache, compiled):
    compiler.compile_cubin(*SMALL)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    assert compiler.compile_cubin(*SMALL) == b"cubin" and len(compiled) == 1
    for damaged in (whole[:-1], b"x" + whole[1:], b""):
        entry.write_bytes(damaged)
        assert compiler.compile_cubin(*SMALL) == b"cubin"
        assert entry.read_bytes() == whole
    assert len(compiled) == 4 and list(cache.iterdir()) == [entry]


def test_cache_key_has_everything(cache, compiled, monkeypatch):
    compiler.compile_cubin(*SMALL)
    compiler.compile_cubin(SMALL[0], SMALL[1], "sm_80")
    compiler.compile_cubin(SMALL[0], {**SMALL[1], "CHANNELS_A_THREAD": 1}, "sm_90")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    compiler.compile_cubin(*SMALL)
    assert len(list(cache.iterdir())) == len(compiled) == 4


def _write_and_read(data, failures):
    for _ in range(100):
        cubins.write("entry", data)
        if cubins.read("entry") not in (b"a" * 10**5, b"b" * 10**5):
            failures.put(data[:1])


def test_two_processes_at_once(cache):
    """Whatever they read is whole, and nothing else is left."""
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [context.Process(target=_write_and_read, args=(letter * 10**5, failures)) for letter in (b"a", b"b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert failures.empty()
    assert [entry.name for entry in cache.iterdir()] == ["entry"]


def _warns_once(match: str) -> None:
    """The first call says why the kernel is compiled again, the next says nothing."""
    with pytest.warns(UserWarning, match=match) as told:
        assert compiler.compile_cubin(*SMALL) == b"cubin"
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.compile_cubin(*SMALL) == b"cubin"


def test_cache_that_cannot_be_made(tmp_path, monkeypatch, compiled):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(blocker / "cache"))
    _warns_once(f"the cache folder {blocker}/cache cannot be made .*; set VMAMBA_KERNELS_CACHE to one that can")
    assert len(compiled) == 2


def test_no_home(monkeypatch, compiled):
    """As in a container whose user has a number and no name."""
    monkeypatch.delenv("VMAMBA_KERNELS_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    _warns_once("no home folder is known to keep them in; set VMAMBA_KERNELS_CACHE to a folder of your own")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(cache, monkeypatch, compiled, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("pathlib.Path.replace", fail)
    if isinstance(error, OSError):
        _warns_once("cannot be written .No space left on device.; set VMAMBA_KERNELS_CACHE to one that can")
    else:
        with pytest.raises(KeyboardInterrupt):
            compiler.compile_cubin(*SMALL)
    assert not list(cache.iterdir())


def test_others_may_read_a_cache_and_not_write_it(cache, compiled):
    before = os.umask(0)  # the most that one can allow
    try:
        compiler.compile_cubin(*SMALL)
    finally:
        os.umask(before)
    (entry,) = cache.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o644 and cache.stat().st_mode & 0o777 == 0o755


def _give_to_another(path, monkeypatch):
    """`path` then belongs to somebody else: root gives it away, another user becomes another one."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o757])
def test_a_folder_that_others_can_write_is_not_trusted(cache, compiled, mode):
    compiler.compile_cubin(*SMALL)
    cache.chmod(mode)
    _warns_once(rf"the cache folder {cache} can be written by others \(mode {mode:04o}\); .*chmod go-w.*VMAMBA_KERNELS")
    assert len(compiled) == 3 and len(list(cache.iterdir())) == 1


def test_a_folder_of_somebody_else_is_not_trusted(cache, compiled, monkeypatch):
    compiler.compile_cubin(*SMALL)
    _give_to_another(cache, monkeypatch)
    _warns_once(rf"the cache folder {cache} belongs to another user \(number \d+\); .*set VMAMBA_KERNELS_CACHE")
    assert len(compiled) == 3 and len(list(cache.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_entry_of_somebody_else_is_not_trusted(cache, compiled, monkeypatch):
    compiler.compile_cubin(*SMALL)
    (entry,) = cache.iterdir()
    _give_to_another(entry, monkeypatch)
    _warns_once(rf"an entry of the cache folder {cache} belongs to another user \(number 12345\)")
    assert len(compiled) == 2 and entry.stat().st_uid == 0  # written again, and then read


def test_an_entry_that_others_can_write_is_not_trusted(cache, compiled):
    compiler.compile_cubin(*SMALL)
    (entry,) = cache.iterdir()
    entry.chmod(0o666)
    _warns_once(rf"an entry of the cache folder {cache} can be written by others \(mode 0666\); remove such files")
    assert len(compiled) == 2 and entry.stat().st_mode & 0o777 == 0o644


def test_an_entry_under_another_name_is_not_taken(cache, compiled):
    compiler.compile_cubin(*SMALL)
    compiler.compile_cubin(SMALL[0], SMALL[1], "sm_80")
    one, other = sorted(cache.iterdir())
    one.replace(other)
    compiler.compile_cubin(*SMALL)
    compiler.compile_cubin(SMALL[0], SMALL[1], "sm_80")
    assert len(compiled) == 4


def test_unknown_architecture(cache):
    with pytest.raises(BackendError, match=r"does not know sm_10, only sm_.*pip install --upgrade nvidia-cuda-nvrtc"):
        compiler.compile_cubin(SMALL[0], SMALL[1], "sm_10")
    with pytest.raises(BackendError, match=r"(?s)could not compile pixels\.cu for sm_90: .*identifier"):
        compiler.compile_cubin(SMALL[0], {}, "sm_90")


def test_without_what_only_some_systems_have():
    """Windows has no Triton, no cuda.core of ours and not Unix's modules; without numba too the reference serves, and
    says why."""
    code = """
import os, sys, torch
for name in ("cuda.core", "triton", "numba", "fcntl", "grp", "posix", "pwd", "resource", "termios"):
    sys.modules[name] = None
del os.geteuid, os.getuid
import vmamba_kernels as vk
from vmamba_kernels.cuda import compiler, cubins
u = torch.ones(1, 2, 3, requires_grad=True)
B = torch.ones(1, 1, 2, 3)
vk.selective_scan(u, u.detach(), -torch.ones(2, 2), B, B).sum().backward()
assert u.grad.isfinite().all()
cubins.write("entry", b"cubin")
assert cubins.read("entry") == b"cubin"
call = vk.Call("selective_scan", u.device, u.dtype, u.dtype)
print(vk.choice(call))
try: compiler.nvrtc_version()
except vk.BackendError as error: print(error)
"""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "VMAMBA_KERNELS_CACHE": folder}
        command = [sys.executable, "-W", "error", "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert re.search(
        r"reference \(not triton: it cannot be imported \(.*triton.*; not cuda: the tensors are on cpu.*"
        r"not cpu: it cannot be imported \(.*numba.*; pip install --upgrade numba\)",
        out,
    )
    assert "pip install cuda-core nvidia-cuda-nvrtc" in out


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU of capability `gpu[0]`, for which Triton works."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(compiler, "make_current", lambda index: None)
    monkeypatch.setattr("vmamba_kernels.triton.why_not_on", lambda index: None)
    compiler.why_not_on.cache_clear()
    compiler.load.cache_clear()
    yield capability
    compiler.why_not_on.cache_clear()
    compiler.load.cache_clear()


@pytest.fixture
def working_gpu(gpu, monkeypatch):
    monkeypatch.setattr("vmamba_kernels.cuda.why_not_on", lambda device: None)
    return gpu


def _call(**changes) -> Call:
    values = {
        "operator": "cross_selective_scan", "device": torch.device("cuda:0"), "dtype": BF16, "out_dtype": BF16,
        "dim": 96, "states": 16, "rank": 6, "routes": ("row",),
    }  # fmt: skip
    return Call(**{**values, **changes})


def test_serves_what_it_can(working_gpu):
    assert why_not(_call()) is None
    assert why_not(_call(operator="selective_scan", rank=0, routes=())) is None


@pytest.mark.parametrize("changes, reason", [
    ({"device": torch.device("cpu")}, "the tensors are on cpu, not on an NVIDIA GPU"),
    ({"dtype": torch.float64}, "float64 is not among its types"),
    ({"out_dtype": torch.float64}, "float64 is not among its types"),
    ({"states": MAX_STATES + 1}, f"1 to {MAX_STATES} states, not {MAX_STATES + 1}"),
    ({"rank": MAX_RANK + 1}, f"rank 1 to {MAX_RANK}, not {MAX_RANK + 1}"),
    ({"routes": ("row",) * 32}, "at most 31 routes, not 32"),
])  # fmt: skip
def test_says_why_not(working_gpu, changes, reason):
    assert reason in why_not(_call(**changes))


def test_old_gpu(working_gpu):
    working_gpu[0] = (7, 5)
    assert "compute capability 8.0 or newer" in why_not(_call())
    assert "not 7.5" in why_not(_call())


@pytest.mark.parametrize("operator", ["cross_selective_scan", "cross_ssd"])
def test_a_new_route_is_a_reason(working_gpu, operator):
    """Until a backend learns it, whoever knows it serves: routes are named in the reference."""
    call = _call(operator=operator, routes=("row", "spiral"))
    chosen = choice(call)
    assert chosen.backend == "reference"
    assert "it does not know the route spiral, only row, col, row_rev, col_rev" in chosen.declined["triton"]
    assert operator == "cross_ssd" or "it does not know the route spiral" in chosen.declined["cuda"]
    with pytest.raises(BackendError, match="cannot serve .* here: it does not know the route spiral"):
        choice(call, "triton")


def test_missing_nvrtc_is_a_reason(gpu, monkeypatch):
    def missing():
        raise BackendError(compiler.INSTALL)

    monkeypatch.setattr(compiler, "nvrtc_version", missing)
    assert "pip install cuda-core nvidia-cuda-nvrtc" in why_not(_call())


def test_an_architecture_that_nvrtc_does_not_know_is_a_reason(gpu, cache):
    gpu[0] = (99, 0)
    chosen = choice(_call())
    assert chosen.backend == "triton"
    assert re.fullmatch(
        r"triton \(not cuda: NVRTC \d+\.\d+ does not know sm_990, only sm_\d+, .*; a newer one may: "
        r"pip install --upgrade nvidia-cuda-nvrtc\)",
        str(chosen),
    )


@pytest.mark.parametrize("where", ["library", "kernel", "function", "context"])
def test_code_that_the_driver_does_not_load_is_a_reason(gpu, cache, monkeypatch, where):
    """Wherever it refuses: the cubin, the kernel in it, its function on the device, or cuda.core itself."""
    from cuda.bindings import driver

    core, refusal = compiler.cuda_core(), RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    def refuse(*_):
        raise refusal

    def code(_):
        if where == "library":
            raise refusal
        return SimpleNamespace(get_kernel=refuse if where == "kernel" else lambda name: SimpleNamespace(handle=1))

    fake = SimpleNamespace(Program=core.Program, ProgramOptions=core.ProgramOptions, launch=None, Stream=core.Stream)
    fake.ObjectCode = SimpleNamespace(from_cubin=code)
    monkeypatch.setattr(compiler, "cuda_core", lambda: fake)
    if where == "context":
        monkeypatch.setattr(compiler, "make_current", refuse)
    refused = driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    monkeypatch.setattr(driver, "cuKernelGetFunction", lambda kernel: (refused, None))
    chosen = choice(_call())
    assert chosen.backend == "triton"
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU" in chosen.declined["cuda"]
    assert where == "context" or "take a newer driver" in chosen.declined["cuda"]


def test_why_triton_serves_where_it_is_the_fastest(working_gpu):
    """Nothing is declined: for few states without a gradient Triton stands first."""
    call = _call(operator="selective_scan", rank=0, routes=(), states=1)
    assert str(choice(call)) == "triton"
    assert str(choice(replace(call, gradient=True))) == "cuda"
    assert str(choice(replace(call, gradient=True), "reference")) == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_a_reason():
    chosen = choice(_call())
    assert chosen.backend == "reference" and set(chosen.declined) == {"cuda", "triton", "cpu"}
    assert all("sees no GPU" in chosen.declined[name] for name in ("cuda", "triton"))
    assert chosen.declined["cpu"] == "the tensors are on cuda:0, not on the CPU"


def test_asked_for_on_a_cpu():
    x = torch.zeros(1, 2, 2, 4)
    with pytest.raises(BackendError, match="'cuda' cannot serve cross_selective_scan here: the tensors are on cpu"):
        cross_selective_scan(
            x,
            torch.zeros(1, 3, 4),
            torch.zeros(1, 4, 1),
            None,
            -torch.ones(1, 4, 1),
            None,
            routes=("row",),
            backend="cuda",
        )


@pytest.mark.parametrize("save", [True, False])
def test_fake_implementations(save):
    """Shapes, dtypes and gradients without a GPU, as torch.compile asks for them."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 20, 20, 24, dtype=F16, device="cuda")
        weights = torch.empty(4, 3 + 32, 24, dtype=F16, device="cuda"), torch.empty(4, 24, 3, dtype=F16, device="cuda")
        state = [torch.empty(4, 24, *shape, device="cuda") for shape in ((), (16,), ())]
        out, borders, packed, skip = torch.ops.vmamba.cross_selective_scan_cuda(
            x, *weights, *state, 0b11100100, F32, save
        )
        assert out.shape == x.shape and out.dtype == F32
        assert borders.shape == ((2, 4, 8, 16, 24) if save else (0,)) and borders.dtype == BF16
        grads = torch.ops.vmamba.cross_selective_scan_bwd_cuda(
            out, x, packed, weights[1], *state[:2], skip, borders, 0b11100100
        )
        for grad, t in zip(grads, (x, *weights, *state), strict=True):
            assert grad.shape == t.shape and grad.dtype == t.dtype

        u, B = torch.empty(2, 24, 100, device="cuda"), torch.empty(2, 3, 4, 100, device="cuda")
        A, D = torch.empty(24, 4, device="cuda"), torch.empty(24, device="cuda")
        out, borders = torch.ops.vmamba.selective_scan_cuda(u, u, A, B, B, D, D, True, F32, save)
        assert out.shape == u.shape and borders.shape == ((2, 3, 6, 4, 8) if save else (0,))
        grads = torch.ops.vmamba.selective_scan_bwd_cuda(out, u, u, A, B, B, D, D, borders, True)
        assert [g.shape for g in grads] == [t.shape for t in (u, u, A, B, B, D, D)]


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
    for module in (norms, convolutions):
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
