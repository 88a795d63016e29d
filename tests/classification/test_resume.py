"""A run that was stopped anywhere and resumed ends as the uninterrupted one, bit for bit, and loses nothing."""

import os
import shutil
import signal
import time

import pytest
import torch

from vmamba.classification.task import Accuracy
from vmamba.config import output_folder
from vmamba.data.loaders import TrainLoader
from vmamba.errors import UserError
from vmamba.runtime import saving
from vmamba.runtime.run import Run
from vmamba.runtime.step import OptimizerStep
from vmamba.runtime.stop import Stopped
from vmamba.runtime.trainer import Rounds, run

from ..forked import Program
from .tiny import command, differences, log, metrics, saved, tiny_config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("uninterrupted"))
    run(config)
    return config


def assert_same_run(config, uninterrupted):
    one, other = saved(config), saved(uninterrupted)
    assert not differences({**one, "config": None}, {**other, "config": None})
    assert metrics(config) == metrics(uninterrupted)


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): a signal arrives while that step is computed."""

    def arrange(step, signum=signal.SIGTERM):
        whole_step = OptimizerStep.__call__

        def interrupted(self, state, *args, **options):
            if state.step == step:
                signal.raise_signal(signum)
            return whole_step(self, state, *args, **options)

        monkeypatch.setattr(OptimizerStep, "__call__", interrupted)

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize(("step", "workers"), [(0, 2), (1, 0), (2, 2), (4, 0)])
def test_stopped_at_a_signal_and_resumed(tmp_path, uninterrupted, stop_at, monkeypatch, step, workers):
    config = tiny_config(tmp_path, "DATA.NUM_WORKERS", workers)
    stop_at(step)
    with pytest.raises(Stopped, match="SIGTERM"):
        run(config)
    monkeypatch.undo()
    # The signal arrives before the step, after the request was looked at: the step after it is the last, unless the
    # evaluation comes first, which it ends.
    assert saved(config)["step"] == step + (1 if step % 3 == 2 else 2)
    assert len(metrics(config)) == step // 3
    lines_before = metrics(config)
    run(config)
    assert f"resumed {output_folder(config) / 'last.pth'}" in log(config)
    assert metrics(config)[: len(lines_before)] == lines_before
    assert_same_run(config, uninterrupted)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_stopped_and_resumed_where_reports_come_a_step_later_as_on_a_gpu(tmp_path, stop_at, monkeypatch, step):
    monkeypatch.setattr(OptimizerStep, "reads_late", lambda self, state: True)
    whole, config = (tiny_config(tmp_path, "PRINT_FREQ", 2, "TAG", tag) for tag in ("whole", "default"))
    run(whole)
    stop_at(step)
    with pytest.raises(Stopped, match="SIGTERM"):
        run(config)
    # The step that the signal arrived in is reported as good, the next one as the last, while one more is computed.
    assert saved(config)["step"] == min(step + 3, 3 * (step // 3 + 1))
    monkeypatch.undo()
    monkeypatch.setattr(OptimizerStep, "reads_late", lambda self, state: True)
    run(config)
    assert_same_run(config, whole)
    lines = [line for line in log(whole).splitlines() if "train [" in line]
    assert [line.partition("train ")[2][:10] for line in lines] == [
        "[1/2][2/3]",
        "[1/2][3/3]",
        "[2/2][2/3]",
        "[2/2][3/3]",
    ]


def test_killed_after_an_epochs_line_the_line_is_not_written_twice(tmp_path, uninterrupted, monkeypatch):
    config = tiny_config(tmp_path, "TRAIN.SAVE_STEPS", 2)
    save = Run.save

    def killed_at_the_end(run, state, *names):
        if state.epoch == 2:
            raise KeyboardInterrupt
        save(run, state, *names)

    monkeypatch.setattr(Run, "save", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    assert metrics(config) == metrics(uninterrupted)
    assert saved(config)["step"] == 6
    run(config)
    assert_same_run(config, uninterrupted)


def test_killed_between_the_two_names_of_the_last_epoch(tmp_path, uninterrupted, monkeypatch):
    config = tiny_config(tmp_path)
    also = saving.copy_atomically

    def killed_after_the_best(file, path):
        also(file, path)
        if path.name == "best.pth" and saved(config, "best.pth")["recorded"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(saving, "copy_atomically", killed_after_the_best)
    monkeypatch.setattr(Rounds, "_rank", lambda self, results: True)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    assert (saved(config)["recorded"], saved(config, "best.pth")["recorded"]) == (3, 6)
    (output_folder(config) / "curves.png").unlink()
    run(config)
    assert not differences(saved(config), saved(config, "best.pth"))
    assert metrics(config) == metrics(uninterrupted)
    assert (output_folder(config) / "curves.png").exists()


def test_a_stop_signal_ends_an_evaluation(tmp_path, uninterrupted, monkeypatch):
    config = tiny_config(tmp_path, "DATA.BATCH_SIZE", 6)  # two batches to evaluate on
    add, evaluated = Accuracy.add, []

    def interrupted(self, *args):
        evaluated.append(self)
        signal.raise_signal(signal.SIGHUP)
        add(self, *args)

    monkeypatch.setattr(Accuracy, "add", interrupted)
    with pytest.raises(Stopped, match="SIGHUP"):
        run(config)
    monkeypatch.undo()
    assert len(evaluated) == 2 and metrics(config) == []  # both weights, on the first batch
    assert (saved(config)["step"], saved(config)["recorded"]) == (5, 0)
    run(config)
    assert [line["step"] for line in metrics(config)] == [5, 10]


def test_what_others_put_into_the_folder_changes_nothing(tmp_path, uninterrupted):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1)
    run(config)
    torch.save(saved(config)["model_ema"], output_folder(config) / "exported.pth")  # the newest file there
    shutil.copy(output_folder(uninterrupted) / "last.pth", output_folder(config) / "another_last.pth")
    os.utime(output_folder(config) / "best.pth")
    config = tiny_config(tmp_path)
    run(config)
    # The schedule of one epoch is another, so it is only where it went on that can be compared.
    assert [line["epoch"] for line in metrics(config)] == [1, 2]
    assert "resumed" in log(config) and "starting from the weights" not in log(config)


def test_the_newest_that_loads_is_resumed_and_the_skipped_is_said(tmp_path, uninterrupted):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1)
    run(config)
    last = output_folder(config) / "last.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    config = tiny_config(tmp_path)
    run(config)
    assert "skipped a checkpoint" in log(config)
    assert "last.pth' is truncated" in log(config)
    assert f"resumed {last.with_name('best.pth')}" in log(config)
    assert "changed since: TRAIN.EPOCHS 1 -> 2" in log(config)


def test_an_explicit_checkpoint_goes_before_the_newest(tmp_path, uninterrupted):
    config = tiny_config(tmp_path, "MODEL.RESUME", output_folder(uninterrupted) / "last.pth", "TRAIN.EPOCHS", 3)
    run(config)
    assert [line["epoch"] for line in metrics(config)] == [3]


def test_a_folder_is_the_furthest_state_in_it_and_the_best_is_sought_anew(tmp_path, uninterrupted):
    config = tiny_config(tmp_path, "MODEL.RESUME", output_folder(uninterrupted), "TRAIN.EPOCHS", 3)
    run(config)
    assert f"resumed {output_folder(uninterrupted) / 'last.pth'} after 2 epochs and 0 steps" in log(config)
    assert "here it is sought anew" in log(config)
    assert saved(config, "best.pth")["step"] == 9  # the only one that was evaluated here
    with pytest.raises(UserError, match="is a folder without the state of a run"):
        run(tiny_config(tmp_path, "MODEL.RESUME", tmp_path, "TAG", "none"))


def test_another_global_batch_cannot_resume(tmp_path, uninterrupted):
    options = ("MODEL.RESUME", output_folder(uninterrupted) / "last.pth", "DATA.BATCH_SIZE", 6)
    with pytest.raises(UserError, match="3 steps an epoch and this one has 5"):
        run(tiny_config(tmp_path, *options))


def test_a_best_that_cannot_be_read_is_sought_anew(tmp_path):
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1))
    config = tiny_config(tmp_path)
    os.truncate(output_folder(config) / "best.pth", 1000)
    run(config)
    assert "here it is sought anew" in log(config)
    assert saved(config, "best.pth")["step"] == 6


def test_records_of_a_run_whose_checkpoints_are_gone_are_kept_beside(tmp_path):
    config = tiny_config(tmp_path)
    run(config)
    old = (output_folder(config) / "metrics.jsonl").read_text()
    for path in output_folder(config).glob("*.pth"):
        path.unlink()
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1))
    assert [line["epoch"] for line in metrics(config)] == [1]
    assert (output_folder(config) / "metrics.1.jsonl").read_text() == old
    assert "is of an earlier run and this one starts anew" in log(config)


def test_records_beside_a_state_from_elsewhere_are_another_runs(tmp_path, uninterrupted):
    config = tiny_config(tmp_path, "MODEL.RESUME", output_folder(uninterrupted) / "last.pth", "TRAIN.EPOCHS", 3)
    output_folder(config).mkdir(parents=True)
    (output_folder(config) / "metrics.jsonl").write_text('{"epoch": 9, "step": 27, "acc1": 99}\n')
    run(config)
    assert [line["epoch"] for line in metrics(config)] == [3]
    (output_folder(config) / "best.pth").unlink()
    run(config)
    assert "this run is finished and seeks none" in log(config)
    assert [line["epoch"] for line in metrics(config)] == [3]  # now its own state is the furthest, and these its own


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_signal_while_a_file_is_read_is_no_error_of_the_file(tmp_path, monkeypatch, number):
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1))
    load, calls = torch.load, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(Stopped, match="nothing was trained since the start"):
        run(tiny_config(tmp_path))


@pytest.mark.parametrize(("options", "place"), [(("EVAL_MODE", True), "add"), ((), "__init__")])
def test_a_signal_where_nothing_is_trained_ends_the_run_at_once(tmp_path, uninterrupted, monkeypatch, options, place):
    config = tiny_config(tmp_path, "MODEL.RESUME", output_folder(uninterrupted) / "last.pth", *options)
    whole = getattr(Accuracy if place == "add" else TrainLoader, place)

    def interrupted(self, *args, **named):
        signal.raise_signal(signal.SIGUSR1)
        return whole(self, *args, **named)

    monkeypatch.setattr(Accuracy if place == "add" else TrainLoader, place, interrupted)
    with pytest.raises(Stopped, match="SIGUSR1; nothing was trained since the start") as stop:
        run(config)
    assert stop.value.checkpoint is None
    assert "the run ends: stopped by SIGUSR1" in log(config)
    assert not (output_folder(config) / "last.pth").exists()


def wait_for(condition, process, seconds=120):
    """Until `condition()` holds, while `process` runs."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, "the process ended too soon"
        assert time.time() < end
        time.sleep(0.01)


def test_processes_ended_by_sigterm_to_their_group_and_by_sigkill(tmp_path):
    epochs = 10  # long enough for a signal to arrive in time
    uninterrupted = tiny_config(tmp_path, "TRAIN.EPOCHS", epochs, "TAG", "uninterrupted")
    run(uninterrupted)
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", epochs)
    written = output_folder(config) / "log.txt"

    def start():
        arguments = ("--opts", "TRAIN.EPOCHS", str(epochs), "TRAIN.SAVE_STEPS", "1", "DATA.NUM_WORKERS", "2")
        return Program(*command(tmp_path, *arguments)[1:])

    with start() as process:
        wait_for(lambda: written.exists() and "][1/3]" in written.read_text(), process)
        os.killpg(process.pid, signal.SIGTERM)  # to the loading processes too
        _, stderr = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; saved" in stderr
    stopped_at = saved(config)["step"]
    assert 1 <= stopped_at < 3 * epochs

    with start() as process:
        wait_for(lambda: "train [" in written.read_text().partition("resumed")[2], process)
        os.killpg(process.pid, signal.SIGKILL)
    assert stopped_at <= saved(config)["step"] < 3 * epochs
    run(config)
    assert_same_run(config, uninterrupted)


def test_other_images_than_those_of_the_state_are_told(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)
    run(config)
    state = saved(config)
    assert state["data"]["train"]["images"] == 30 and state["data"]["held_out"]["images"] == 12
    train, held_out = tmp_path / "images/train/class0", tmp_path / "images/val/class0"
    shutil.copy(train / "0.png", train / "more.png")
    (held_out / "0.png").rename(held_out / "other.png")
    run(config)
    words = f"others than those of {output_folder(config) / 'last.pth'}: "
    assert f"the images to train on are {words}31, then 30" in log(config)
    assert f"the images held out are {words}12 as then, of other names or labels" in log(config)
    del state["data"]  # as an earlier version wrote it
    torch.save(state, tmp_path / "old.pth")
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 2, "MODEL.RESUME", tmp_path / "old.pth", "TAG", "old")
    run(config)
    assert "others than" not in log(config)


def test_a_part_that_is_drawn_anew_from_other_images_is_refused(tmp_path):
    opts = ["DATA.VAL_FRACTION", 0.4, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "DATA.BATCH_SIZE", 6]
    config = tiny_config(tmp_path, *opts)
    shutil.rmtree(tmp_path / "images/val")
    run(config)
    (tmp_path / "moved").mkdir()
    (tmp_path / "images").rename(tmp_path / "moved/images")
    run(tiny_config(tmp_path, *opts, "DATA.DATA_PATH", tmp_path / "moved/images"))
    assert "others than" not in log(config)
    shutil.copy(tmp_path / "moved/images/train/class0/0.png", tmp_path / "moved/images/train/class0/00.png")
    words = (
        "the images held out by DATA.VAL_FRACTION are others than those of '.*last.pth' .12 as then.*, and among them"
    )
    with pytest.raises(UserError, match=words):
        run(tiny_config(tmp_path, *opts, "DATA.DATA_PATH", tmp_path / "moved/images"))


def test_early_stopping_is_exact_on_resume(tmp_path, monkeypatch):
    """A run whose results get worse ends after PATIENCE evaluations; so it does when it was stopped in between, and
    with more patience it goes on as if it had never ended."""
    results = iter([])
    told = Accuracy.results

    def scripted(self):
        return told(self) | {"acc1": next(results)}

    monkeypatch.setattr(Accuracy, "results", scripted)
    early = ("TRAIN.EMA.ENABLE", False, "TRAIN.EPOCHS", 6)
    script = [10.0, 30.0, 30.0, float("nan"), 40.0, 5.0]

    def go(tag, patience, answers):
        nonlocal results
        results = iter(answers)
        config = tiny_config(tmp_path, *early, "TAG", tag, "TRAIN.PATIENCE", patience)
        run(config)
        assert next(results, None) is None  # all were asked for
        return config

    whole = go("whole", 3, script)
    assert [line["unimproved"] for line in metrics(whole)] == [0, 0, 1, 2, 0, 1]
    assert "training ends" not in log(whole)
    stopped = go("stopped", 2, script[:4])
    assert saved(stopped)["step"] == 12 and saved(stopped)["best"] == {"acc1": 30.0}
    assert "no result was better in 2 evaluations (TRAIN.PATIENCE 2): training ends 6 steps early" in log(stopped)
    go("stopped", 2, [7.0])  # nothing is left: the weights are evaluated, and stay
    assert "12 of 18 steps are done, and no result was better in 2 evaluations" in log(stopped)
    assert saved(stopped)["step"] == 12 and len(metrics(stopped)) == 4
    assert_same_run(go("stopped", 3, script[4:]), whole)
    with pytest.raises(StopIteration):
        go("killed", 2, script[:3])
    assert saved(killed := go("killed", 2, script[3:4]))["step"] == 12  # which the state before the evaluation told
    assert [line["unimproved"] for line in metrics(killed)] == [0, 0, 1, 2]
