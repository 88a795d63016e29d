"""run.json: every start of a run with its code and place, and how it ended."""

import json
import signal
import subprocess

import pytest
import torch

from vmamba.classification.task import Task
from vmamba.config import output_folder
from vmamba.errors import UserError
from vmamba.runtime import history, profiling
from vmamba.runtime.distributed import World
from vmamba.runtime.history import facts
from vmamba.runtime.step import OptimizerStep
from vmamba.runtime.stop import Stopped
from vmamba.runtime.trainer import run

from .tiny import log, tiny_config


def starts(config):
    return json.loads((output_folder(config) / "run.json").read_text())["starts"]


def test_every_start_and_its_end(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1)
    whole = OptimizerStep.__call__

    def interrupted(self, state, *args, **options):
        (open_,) = starts(config)  # while it goes on
        assert open_["end"] is open_["ended"] is None and open_["seed"] == 3
        signal.raise_signal(signal.SIGTERM)
        return whole(self, state, *args, **options)

    def broken(self, *_, **__):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerStep, "__call__", interrupted)
        with pytest.raises(Stopped):
            run(config)
    with monkeypatch.context() as patch:
        patch.setattr(Task, "train_loader", broken)
        with pytest.raises(RuntimeError):
            run(config)
    with pytest.raises(UserError):
        run(tiny_config(tmp_path, "DATA.DATA_PATH", tmp_path / "nowhere"))
    run(config)
    run(config)
    run(tiny_config(tmp_path, "EVAL_MODE", True))
    ends = [start["end"] for start in starts(config)]
    assert ends[0].startswith("stopped by SIGTERM; saved ") and ends[1] == "RuntimeError: boom"
    assert ends[2].startswith(f"data path '{tmp_path}/nowhere' does not exist;")
    assert ends[3:] == ["finished, 3 of 3 steps"] * 2
    assert all(start["started"] <= start["ended"] and start["command"] for start in starts(config))
    assert starts(config)[0]["devices"] == ["CPU, 1 thread"]
    evaluation = json.loads((output_folder(config) / "evaluation.json").read_text())
    assert evaluation["by"]["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_file_that_is_none_of_ours_stays(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1)
    output_folder(config).mkdir(parents=True)
    (output_folder(config) / "run.json").write_text("mine")
    run(config)
    assert (output_folder(config) / "run.json").read_text() == "mine"
    assert "cannot record" in log(config) and "1 step" not in log(config)


def test_the_code_is_told_by_its_repository(tmp_path, monkeypatch):
    config, world = tiny_config(tmp_path), World(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(history, "_REPOSITORY", tmp_path / "code")
    (tmp_path / "code").mkdir()
    assert (facts(config, world)["commit"], facts(config, world)["changed"]) == (None, None)
    git = ["git", "-C", str(tmp_path / "code"), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (facts(config, world)["commit"], facts(config, world)["changed"]) == (head, False)
    (tmp_path / "code" / "new.py").touch()
    assert facts(config, world)["changed"] is True
    subprocess.run([*git, "add", "new.py"], check=True)
    (tmp_path / "code" / "new.py").write_text("print('changed')\n")
    run(config)
    (start,) = starts(config)
    assert (start["changed"], start["diff"]) == (True, "changes.1.diff")
    assert "+print('changed')" in (output_folder(config) / "changes.1.diff").read_text()
    monkeypatch.setattr(history, "LARGEST_DIFF", 5)
    run(config)
    assert starts(config)[1]["diff"] is None


def test_a_run_without_steps_to_profile_says_so(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "PROFILE", 3)
    for before, said in (
        (6, "PROFILE records steps behind the first 6 of a start, and this one had 6"),
        (5, "1 step is"),
    ):
        monkeypatch.setattr(profiling, "BEFORE", before)
        run(tiny_config(tmp_path, "PROFILE", 3, "TAG", before))
        folder = output_folder(config).with_name(str(before))
        assert said in (folder / "log.txt").read_text()
        assert (folder / "profile.json").exists() == (before == 5)


def test_a_profile_of_some_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "BEFORE", 2)
    config = tiny_config(tmp_path, "PROFILE", 3)
    run(config)
    folder = output_folder(config)
    events = json.loads((folder / "profile.json").read_text())["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 3
    assert "aten::addmm" in (folder / "profile.txt").read_text() or "aten::mm" in (folder / "profile.txt").read_text()
    assert "the profile of 3 steps is in" in log(config)
