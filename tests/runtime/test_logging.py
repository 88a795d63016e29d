"""The log and the metrics: appended to, never lost, one line an epoch."""

import json
import re
from unittest.mock import Mock

import pytest

from vmamba.errors import UserError
from vmamba.runtime import logging, records
from vmamba.runtime.distributed import World
from vmamba.runtime.logging import Pace, create_logger, megabytes, memory_mb, progress
from vmamba.runtime.records import read_metrics, write_metrics
from vmamba.runtime.report import describe_loading

from .conftest import CPU


def test_a_resumed_run_appends_to_its_log(tmp_path):
    create_logger(CPU, tmp_path).info("first run")
    create_logger(CPU, tmp_path).debug("second run")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("first run")
    assert second.endswith("second run")


def test_into_a_file_every_line_goes_to_stdout_once(tmp_path, capsys):
    logger = create_logger(CPU, tmp_path)
    logger.info("an epoch")
    logger.debug("a step")
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["an epoch", "a step"]


def test_a_terminal_gets_a_bar_instead_of_step_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vmamba.runtime.logging.on_terminal", lambda: True)
    logger = create_logger(CPU, tmp_path)
    logger.info("an epoch")
    logger.debug("a step")
    assert "a step" not in capsys.readouterr().out
    assert "a step" in (tmp_path / "log.txt").read_text()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write '.*file/run': Not a directory; free some space or choose another folder"
    ):
        create_logger(CPU, tmp_path / "file" / "run")


def test_an_epoch_has_one_line_and_none_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for epoch, loss in [(1, 0.5), (2, 0.4), (3, 0.3), (2, 0.41)]:
        write_metrics(path, {"epoch": epoch, "train_loss": loss})
    written = read_metrics(path)
    assert written == [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["epoch"], entry["train_loss"]) for entry in written] == [(1, 0.5), (2, 0.41), (3, 0.3)]


def test_a_line_cut_short_does_not_cost_the_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, {"epoch": 1, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"epoch": 2, "lo')
    write_metrics(path, {"epoch": 2, "loss": 0.4})
    assert [entry["epoch"] for entry in read_metrics(path)] == [1, 2]


def test_what_is_no_round_stays_and_older_names_are_read_as_todays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    notes = ['{"note": "restarted by hand"}', "[1]", '{"epoch": "x"}', "caf\udce9"]
    path.write_text("\n".join([*notes, '{"epoch": 1, "loss": 0.5, "ema_loss": 0.4}', ""]), errors="surrogateescape")
    write_metrics(path, {"epoch": 2, "val_loss": 0.3})
    assert path.read_text(errors="surrogateescape").splitlines()[:4] == notes
    assert read_metrics(path) == [{"epoch": 1, "val_loss": 0.5, "ema_val_loss": 0.4}, {"epoch": 2, "val_loss": 0.3}]


def test_events_after_the_place_of_a_resumed_run_are_superseded(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(records, "SummaryWriter", lambda folder, **options: made.append(options) or Mock())
    resumed = records.Records(tmp_path, {})
    resumed.write_events({"train/loss": 1.0}, 7)
    resumed.write_events({"train/loss": 1.0}, 8)
    assert made == [{"purge_step": 7}]


def test_numbers_that_json_has_no_name_for_are_null(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", {"epoch": 1, "lr": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1, "lr": null}\n'


def test_memory_that_nothing_tells(monkeypatch):
    """As on Windows, where there is no module `resource`."""
    assert re.fullmatch(r"\d+MB", megabytes(memory_mb(CPU.device)))
    monkeypatch.setattr(logging, "resource", None)
    assert megabytes(memory_mb(CPU.device)) == "unknown"


def test_pace_counts_steps_not_micro_batches():
    pace = Pace("abcdef", step=10)
    assert list(pace) == list("abcdef")
    seconds, waiting = pace.lap(12)
    again, _ = pace.lap(13)
    assert 0 <= waiting <= seconds
    assert again >= 0


def test_the_cores_that_loading_needs_by_hand():
    """1,000 images in 8 s of computing are 125 a second, of 4 ms each."""
    told = describe_loading(seconds_an_image=0.004, images=1000, seconds=10.0, waited=2.0)
    assert "waited 2.0 of 10.0 s for data" in told and "takes 4.00 ms of a core" in told
    assert "could train 125 images/s: that needs 0.5 cores" in told


def test_long_work_shows_a_bar_on_rank_0s_terminal_alone(capsys, monkeypatch):
    assert list(progress(range(3), CPU, "epoch 1/2")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("vmamba.runtime.logging.on_terminal", lambda: True)
    assert list(progress(range(3), CPU, "epoch 1/2")) == [0, 1, 2]
    assert re.search(r"epoch 1/2: .*0/3 \[00:00<", capsys.readouterr().err)
    list(progress(range(3), World(1, 2, 1, CPU.device), "epoch 1/2"))
    assert capsys.readouterr().err == ""
