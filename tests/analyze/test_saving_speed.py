"""What saving costs: the numbers are of the saves that they name."""

import json
import time

from vmamba.analysis import saving_speed as module
from vmamba.analysis.saving_speed import saving_speed


def test_a_blocking_save_stalls_for_as_long_as_it_takes(tmp_path, monkeypatch, capsys):
    write = module.save_checkpoint

    def slow(*args):
        time.sleep(1.5)
        write(*args)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    monkeypatch.setattr("vmamba.runtime.saving.save_checkpoint", slow)
    stalls = saving_speed(model="vmamba_digits", size=32, batch=4, repeats=1, device="cpu", output=str(tmp_path))
    assert (
        stalls.blocking >= 1.5 and stalls.background < stalls.blocking
    )  # the sleep alone; a loaded machine adds to both
    assert json.loads((tmp_path / "saving.json").read_text())["blocking"] == stalls.blocking
    assert "| blocking | " in capsys.readouterr().out
