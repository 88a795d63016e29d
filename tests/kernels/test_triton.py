"""The Triton backend: its numbers in processes of their own, and what it says when it cannot serve."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vmamba_kernels as vk
import vmamba_kernels.triton as backend
from vmamba_kernels.triton import scan_kernels, ssd

CASES = Path(__file__).with_name("triton_cases.py")
ROOT = CASES.parents[2]


HALVES = ("images or sequences or extreme", "not (images or sequences or extreme)")  # of about the same time


def run_cases(**environment):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(CASES), "-k"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    halves = [subprocess.Popen([*command, half], env=environment, cwd=ROOT, **pipes) for half in HALVES]
    outputs = [half.communicate()[0] for half in halves]
    for half, output in zip(halves, outputs, strict=True):
        assert half.returncode == 0, output[-6000:]


def test_kernels_agree_with_the_reference_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_agree_with_the_reference_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


def compile_for(architecture, kernel, dtype, constants, ones=("u_d", "B_n"), warps=2):
    """The compiled kernel, made where no GPU is; pointers are float32 but those of images and projections."""
    varying = {"u", "x", "dt", "B", "C", "P", "w", "y", "dy", "du", "ddt", "dP", "values"}
    floats = {"bias", "A2", "skip", "states", "sums", "adjoints", "scratch", "dB", "dC", "dA", "dbias", "dskip"}
    signature, known = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in ones:
            signature[name], known[(i,)] = "constexpr", constants.get(name, 1)
        else:
            signature[name] = f"*{dtype}" if name in varying else "*fp32" if name in floats else "i32"
    source = ASTSource(kernel, signature, known)
    return triton.compile(source, GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


@pytest.mark.parametrize("architecture, dtype, states", [(80, "fp32", 1), (120, "bf16", 16)])
def test_scan_kernels_compile_without_tf32(architecture, dtype, states):
    """Triton turns some sums of products into TF32 matrix products by itself; then float32 loses digits."""
    constants = dict(
        N=states, NP=states, RANK=12, C_AT=states, DT_AT=2 * states, STEPS=16 if states == 1 else 2, BLOCK=64,
        HAS_BIAS=True, HAS_SKIP=True, SOFTPLUS=True, WIDE=False, MODE="save", SPLIT=False,
    )  # fmt: skip
    for kernel in (scan_kernels.scan_fwd_kernel, scan_kernels.scan_bwd_kernel):
        compiled = compile_for(architecture, kernel, dtype, constants)
        assert "tt.dot" not in compiled.asm["ttir"]
        assert compiled.asm["cubin"]


@pytest.mark.parametrize("architecture", [80, 90])
def test_ssd_kernels_compile(architecture):
    """Into plain matrix instructions: of Hopper's own (wgmma) some are wrong at a model's 64 states and 16 channels."""
    constants = dict(
        N=64, NP=64, HEAD=16, HP=16, Q=ssd.MAX_CHUNK, HAS_BIAS=True, HAS_SKIP=True, WIDE=False, ADJOINT=True,
        PRECISION="tf32",
    )  # fmt: skip
    for kernel in (ssd.ssd_state_kernel, ssd.ssd_fwd_kernel, ssd.ssd_bwd_kernel):
        compiled = compile_for(architecture, kernel, "bf16", constants, warps=ssd.WARPS)
        assert "mma.sync" in compiled.asm["ptx"] and "wgmma" not in compiled.asm["ptx"]
        assert compiled.asm["cubin"]


def test_says_why_it_cannot_serve():
    def reason(device="cpu", dtype=torch.float32, **sizes):
        call = vk.Call("cross_selective_scan", torch.device(device), dtype, dtype, **sizes)
        return vk.explain(call)["triton"]

    assert "needs a GPU" in reason()
    assert "device type 'cuda'" in reason(device="meta")
    with pytest.raises(vk.BackendError, match=r"backend 'triton' cannot serve cross_ssd here: Triton needs a GPU"):
        vk.cross_ssd(torch.ones(1, 2, 2, 4), torch.ones(4, 4, 4), None, -torch.ones(4, 2), None, backend="triton")


def test_says_which_size_is_beyond_it(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)  # as if on a device that it serves

    def reason(dtype=torch.float32, **sizes):
        return backend.why_not(vk.Call("cross_selective_scan", torch.device("cpu"), dtype, dtype, **sizes))

    assert reason(states=64, rank=48, routes=("row",) * 31) is None
    assert "float64" in reason(dtype=torch.float64)
    assert "64 states, and there are 65" in reason(states=65)
    assert "this one is 257" in reason(rank=257)
    assert "there are 32" in reason(routes=("row",) * 32)
