"""The Triton backend: its numbers in processes of their own, and what it says when it cannot serve."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vmamba_kernels as vk

CASES = Path(__file__).with_name("triton_cases.py")
ROOT = CASES.parents[2]


def run_cases(**environment):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--durations=5", str(CASES)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_kernels_agree_with_the_reference_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_agree_with_the_reference_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


def test_says_why_it_cannot_serve():
    def reason(device="cpu", dtype=torch.float32, **sizes):
        call = vk.Call("cross_selective_scan", torch.device(device), dtype, dtype, **sizes)
        return vk.explain(call)["triton"]

    assert "needs a GPU" in reason()
    assert "device type 'cuda'" in reason(device="meta")
    with pytest.raises(vk.BackendError, match=r"backend 'triton' cannot serve cross_ssd here: Triton needs a GPU"):
        vk.cross_ssd(torch.ones(1, 2, 2, 4), torch.ones(4, 4, 4), None, -torch.ones(4, 2), None, backend="triton")


def test_says_which_size_is_beyond_it(monkeypatch):
    import vmamba_kernels.triton as backend

    monkeypatch.setattr(backend, "INTERPRETED", True)  # as if on a device that it serves

    def reason(dtype=torch.float32, **sizes):
        return backend.why_not(vk.Call("cross_selective_scan", torch.device("cpu"), dtype, dtype, **sizes))

    assert reason(states=64, rank=48, routes=("row",) * 31) is None
    assert "float64" in reason(dtype=torch.float64)
    assert "64 states, and there are 65" in reason(states=65)
    assert "this one is 257" in reason(rank=257)
    assert "there are 32" in reason(routes=("row",) * 32)
