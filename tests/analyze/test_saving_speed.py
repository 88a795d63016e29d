"""What saving costs: the numbers are of the saves that they name."""

import json
from types import SimpleNamespace

from vmamba.analysis import saving_speed as module
from vmamba.analysis.saving_speed import saving_speed


def test_a_blocking_save_stalls_for_as_long_as_it_takes(tmp_path, monkeypatch, capsys):
    clock = [0.0]  # a step takes 1, and writing 10 of the one who writes
    write, step = module.save_checkpoint, module.Training.step

    def slow(*args):
        clock[0] += 10
        write(*args)

    def one_step(training):
        clock[0] += 1
        step(training)

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(module, "save_checkpoint", slow)
    monkeypatch.setattr(module.Training, "step", one_step)
    where = {"folder": str(tmp_path / "not" / "there"), "output": str(tmp_path)}
    stalls = saving_speed(model="vmamba_digits", size=32, batch=4, repeats=1, device="cpu", **where)
    assert (stalls.step, stalls.blocking, stalls.first, stalls.background) == (1, 10, 0, 0)
    assert json.loads((tmp_path / "saving.json").read_text())["blocking"] == 10
    assert "| blocking | 10.000 | 100.0% |" in capsys.readouterr().out
