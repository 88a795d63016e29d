"""--dry-run: everything of a training once, of each task, and nothing is left of it."""

import signal
import subprocess
import sys

import pytest

from tests.classification import tiny as classification
from tests.detection import tiny as detection
from tests.segmentation import tiny as segmentation
from vmamba.config import output_folder
from vmamba.data import loaders
from vmamba.errors import UserError
from vmamba.runtime import dry
from vmamba.runtime.cli import exit_code
from vmamba.runtime.lock import FolderLock
from vmamba.runtime.run import Run
from vmamba.runtime.state import TrainState
from vmamba.runtime.stop import Stopped
from vmamba.runtime.trainer import run


@pytest.fixture
def watched(monkeypatch):
    """What a run does: its steps, the batches that it evaluates, what it saves."""
    seen = {"steps": 0, "batches": [], "saved": []}
    advance, save, evaluating = TrainState.advance, Run.save, loaders.EvalLoader.__iter__

    def step(state):
        seen["steps"] += 1
        advance(state)

    def write(self, state, *names):
        seen["saved"] += names
        save(self, state, *names)

    def batches(loader):
        seen["batches"].append(len(loader))
        return evaluating(loader)

    monkeypatch.setattr(TrainState, "advance", step)
    monkeypatch.setattr(Run, "save", write)
    monkeypatch.setattr(loaders.EvalLoader, "__iter__", batches)
    return seen


@pytest.mark.parametrize("task", [classification, detection, segmentation])
def test_two_steps_two_batches_and_a_save_of_each_task(tmp_path, watched, task, capsys):
    config = task.tiny_config(tmp_path, "DRY_RUN", True, "OUTPUT", tmp_path / "new" / "out", "DATA.BATCH_SIZE", 2)
    assert run(config)
    assert watched["steps"] == 2 and watched["batches"] == [2] and {"last.pth", "best.pth"} <= {*watched["saved"]}
    assert not (tmp_path / "new").exists()
    assert "the dry run went through, evaluation and saving too; its" in capsys.readouterr().out


def test_a_run_that_is_there_stays_as_it_is(tmp_path, watched, monkeypatch):
    """Neither does a dry run go on from it, nor is it touched, nor is the dry run's folder ever gone on from."""
    whole = classification.tiny_config(tmp_path, "TRAIN.EPOCHS", 1)
    run(whole)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(dry, "describe", lambda folder, _: str([*folder.iterdir()]) * (1 // 0))  # it ends by a bug
    watched["steps"] = 0
    with pytest.raises(ZeroDivisionError):
        run(classification.tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "DRY_RUN", True))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    del before[output_folder(whole).parent], after[output_folder(whole).parent]
    assert watched["steps"] == 2 and after == before
    last = output_folder(whole) / "last.pth"
    watched["steps"] = 0
    monkeypatch.setattr(dry, "describe", lambda *_: "")
    run(classification.tiny_config(tmp_path, "TRAIN.EPOCHS", 2, "DRY_RUN", True, "MODEL.RESUME", last))
    assert watched["steps"] == 2  # behind the three of that


@pytest.mark.parametrize("mode", ["EVAL_MODE", "THROUGHPUT_MODE"])
def test_what_is_no_training_is_a_sentence(tmp_path, mode):
    with pytest.raises(UserError, match="--dry-run tries a training, and --eval and --throughput are none; leave one"):
        run(classification.tiny_config(tmp_path, "DRY_RUN", True, mode, True))


def test_what_had_nothing_to_train_says_that_no_step_and_no_save_were_tried(tmp_path, watched, capsys):
    run(classification.tiny_config(tmp_path, "TRAIN.EPOCHS", 0, "DRY_RUN", True))
    assert (watched["steps"], watched["saved"]) == (0, []) and watched["batches"]
    said = capsys.readouterr().out
    assert "nothing to train and went through evaluation alone: a step and a save are not tried; its" in said
    assert "evaluation and saving too" not in said


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Stopped(signal.SIGTERM, "last.pth")])
def test_an_interrupted_one_says_that_nothing_is_kept(tmp_path, monkeypatch, stop, capsys):
    def interrupted(state):
        raise stop

    monkeypatch.setattr(TrainState, "advance", interrupted)
    config = classification.tiny_config(tmp_path, "DRY_RUN", True)
    assert exit_code(lambda: run(config), resumes=True) in (130, 143)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("; nothing of a dry run is kept, and the same command begins anew")
    assert not [*output_folder(config).parent.glob(".dry-run-*")]


def test_what_killed_ones_left_is_removed_and_what_one_holds_is_not(tmp_path):
    config = classification.tiny_config(tmp_path, "TRAIN.EPOCHS", 0, "DRY_RUN", True)
    beside = output_folder(config).parent
    killed, halfway, held, starting = (
        beside / f".dry-run-{name}" for name in ("killed", "halfway", "held", "starting")
    )
    for folder in (killed, halfway, held, starting):
        folder.mkdir(parents=True)
    (halfway / "last.pth").write_bytes(b"0")  # its lock was removed first
    hold = (
        "import sys, pathlib; from vmamba.runtime.lock import FolderLock; "
        "lock = FolderLock(pathlib.Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    holders = [
        subprocess.Popen([sys.executable, "-c", hold, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for folder in (killed, held)
    ]
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"held\n"
        holders[0].kill()
        holders[0].wait()
        assert (killed / ".lock").exists()
        run(config)
        assert sorted(beside.glob(".dry-run-*")) == [held, starting]
        with pytest.raises(UserError, match="is being written by process"):
            FolderLock(held).acquire()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
