"""Several processes beside one: what is started, what is said of it.  No time itself is tested."""

import json
from functools import partial

import pytest
from torch.multiprocessing import ProcessRaisedException

from vmamba.analysis import parallel_speed as module
from vmamba.analysis.parallel_speed import WAYS, parallel_speed
from vmamba.errors import UserError

from ..forked import start_server


def test_processes_train_and_tell(tmp_path, monkeypatch):
    start_server()
    start = partial(module.multiprocessing.start_processes, start_method="forkserver")  # quicker than spawn
    monkeypatch.setattr(module.multiprocessing, "start_processes", start)
    settings = {"models": ["vmamba_digits"], "ways": ["ddp"], "size": 16, "batch": 2, "steps": 1, "device": "cpu"}
    (speed,) = parallel_speed(**settings, counts=[2], output=str(tmp_path))
    assert (speed.model, speed.way, speed.processes, speed.efficiency, speed.memory_mb) == (
        "vmamba_digits", "ddp", 2, None, None,
    )  # fmt: skip
    assert speed.images_per_second == pytest.approx(4 / (speed.milliseconds / 1000))
    assert json.loads((tmp_path / "gpus.json").read_text())[0]["processes"] == 2


def test_efficiency_by_hand(monkeypatch, tmp_path):
    def times(count, cases, *_):  # a second a step of one process; of two, a tenth and a half more
        return [(1.0 if count == 1 else 1.1 + 0.4 * place, None) for place, _ in enumerate(cases)]

    monkeypatch.setattr(module, "_times", times)
    found = parallel_speed(
        models=["vmamba_digits"], ways=["ddp", "fsdp"], counts=[2, 1], batch=8, device="cpu", output=str(tmp_path)
    )
    assert [(speed.way, speed.processes) for speed in found] == [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]
    assert [speed.images_per_second for speed in found] == pytest.approx([8, 16 / 1.1, 8, 16 / 1.5])
    assert [speed.efficiency for speed in found] == pytest.approx([1, 1 / 1.1, 1, 1 / 1.5])
    assert "| vmamba_digits | fsdp | 2 | 1500.0 | 11 | 0.667 |" in (tmp_path / "gpus.md").read_text()


def test_what_a_user_can_do_wrong_is_a_sentence(tmp_path, monkeypatch):
    settings = {"device": "cpu", "output": str(tmp_path), "models": ["vmamba_digits"]}
    with pytest.raises(UserError, match="--ways ddp:cudagraphs needs a GPU, and this runs on cpu; leave it out"):
        parallel_speed(ways=["ddp:cudagraphs"], **settings)

    def fails(*_, **__):
        raise ProcessRaisedException("Traceback ...\nvmamba.errors.UserError: MODEL.BACKEND is auto", 0, 1)

    monkeypatch.setattr(module.multiprocessing, "start_processes", fails)
    with pytest.raises(UserError, match="a process of 2 failed: vmamba.errors.UserError: MODEL.BACKEND is auto"):
        parallel_speed(ways=["fsdp"], counts=[2], **settings)
    assert "fsdp:cudagraphs" not in WAYS and "fsdp:default" in WAYS
