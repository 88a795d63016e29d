"""The benchmark on a CPU: what it times, what it refuses to time, what it says."""

import sys
from pathlib import Path

import pytest
import torch

from vmamba_kernels import reference, registry

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
import benchmark

SMALL = ["--device", "cpu", "--dtype", "float32", "--repeats", "1", "--operators", "selective_scan"]


def test_times_the_fastest_and_writes_a_page(tmp_path, capsys):
    page = tmp_path / "docs" / "kernels.md"
    assert benchmark.main([*SMALL, "--markdown", str(page)]) == 0
    assert "| cpu |" in capsys.readouterr().out
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    page.write_text("# Mine")
    with pytest.raises(SystemExit, match="kernels.md' is no page of this program and would be written over"):
        benchmark.main([*SMALL, "--markdown", str(page)])


def test_does_not_time_a_wrong_gradient(monkeypatch, capsys):
    def wrong(u, *rest):
        if u.dtype == torch.float64:  # what the benchmark compares with
            return reference.selective_scan(u, *rest)
        return reference.selective_scan(u + 0.1 * (u - u.detach()), *rest)  # right output, gradient of u 10% off

    assert (
        registry.why_not("reference", registry.Call("selective_scan", torch.device("cpu"), *[torch.float32] * 2))
        is None
    )
    monkeypatch.setitem(registry._FUNCTIONS, ("reference", "selective_scan"), wrong)
    monkeypatch.setitem(reference.OPERATORS, "selective_scan", wrong)
    assert benchmark.main([*SMALL, "--backends", "reference"]) == 1
    out = capsys.readouterr().out
    assert "WRONG, not timed: u 1.0e-01" in out


def test_says_why_a_backend_is_not_timed(capsys):
    assert benchmark.main([*SMALL, "--backends", "mamba_ssm"]) == 0
    assert "backend 'mamba_ssm' cannot serve selective_scan here" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_that_there_is_no_gpu():
    with pytest.raises(SystemExit, match="There is no GPU here"):
        benchmark.main([])
