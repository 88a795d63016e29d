"""The cuda backend where there is no GPU: its kernels compile, its cache holds, its errors say what to do."""

import contextlib
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vmamba_kernels import BackendError, choice, cross_selective_scan
from vmamba_kernels.cuda import compiler, cubins, why_not
from vmamba_kernels.cuda.layout import MAX_RANK, MAX_STATES, Layout
from vmamba_kernels.cuda.scan import Geometry, Scan
from vmamba_kernels.registry import Call

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
