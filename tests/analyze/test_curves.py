"""Curves: of our runs' folders and of text logs, and that they are drawn."""

import json

import pytest

from vmamba.analysis.curves import curves, read_log, read_run
from vmamba.errors import UserError
from vmamba.runtime.records import read_metrics

# Two epochs of two logged steps each, in the form of Swin's logs, tabs included.
STEP = (
    "[2024-01-0{day} {hour}:00:00 vssm_tiny] (main.py 311): INFO Train: [{epoch}/300][{step}/200]\teta 1 day, 2:03:04 "
    "lr {lr}\t wd 0.0500\ttime 0.41 (0.52)\tloss {loss} ({mean})\tgrad_norm {norm} (3.0)\tloss_scale 65536.0 (65536.0)"
    "\tmem 9000MB"
)
LOG = [
    "[2024-01-01 10:00:00 vssm_tiny] (main.py 90): INFO number of params: 22893448",
    STEP.format(day=1, hour=10, epoch=0, step=0, lr=0.000001, loss=7.0, mean=7.1, norm=1.5),
    STEP.format(day=1, hour=11, epoch=0, step=100, lr=0.00005, loss=6.5, mean=6.75, norm="inf"),
    "[2024-01-01 11:30:00 vssm_tiny] (main.py 370): INFO Test: [0/98]\tTime 1.0 (1.0)\tLoss 1.0 (1.0)\tAcc@1 85.9",
    "[2024-01-01 11:30:00 vssm_tiny] (main.py 380): INFO  * Acc@1 1.250 Acc@5 4.0",
    "[2024-01-01 11:45:00 vssm_tiny] (main.py 380): INFO  * Acc@1 0.5 Acc@5 2.0",
    STEP.format(day=1, hour=23, epoch=1, step=0, lr=0.0001, loss=6.4, mean=6.4, norm=2.5),
    STEP.format(day=2, hour=10, epoch=1, step=199, lr=0.00015, loss=5.5, mean=6.0, norm=3.5),
    "[2024-01-02 11:00:00 vssm_tiny] (main.py 380): INFO  * Acc@1 12 Acc@5 30.0",
    "[2024-01-02 12:00:00 vssm_tiny] (main.py 380): INFO  * Acc@1 8.5 Acc@5 20.0",
]


def test_a_log_of_swins_kind():
    series = read_log(LOG)
    assert series["lr"] == [(0, 0, 1e-6), (0.5, 1, 5e-5), (1, 13, 1e-4), (1.995, 24, 1.5e-4)]
    assert series["train_loss"] == [(0.5, 1, 6.75), (1.995, 24, 6.0)]  # the epochs' last means
    assert series["grad_norm"] == [(0, 0, 1.5), (1, 13, 2.5), (1.995, 24, 3.5)]  # infinity is not drawn
    assert series["acc1"] == [(0, 1.5, 1.25), (2, 25, 12)]
    assert series["ema_acc1"] == [(0, 1.75, 0.5), (2, 26, 8.5)]


def test_a_run_of_ours(digits_run):
    series = read_run(digits_run)
    metrics = read_metrics(digits_run / "metrics.jsonl")
    hours = metrics[0]["seconds"] / 3600
    assert series["acc1"][0] == (1, hours, metrics[0]["acc1"])
    assert [value for _, _, value in series["train_loss"]] == [entry["train_loss"] for entry in metrics]
    assert [epochs for epochs, _, _ in series["grad_norm"]] == pytest.approx([0.4, 0.8, 1, 1.4, 1.8, 2])
    assert read_run(digits_run / "metrics.jsonl") == series


def test_a_resumed_run_counts_a_step_once(tmp_path):
    entry = {"epoch": 1, "train_loss": 2.0, "seconds": 3600}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    line = "2026-01-01 10:00:00,000 DEBUG train [1/2][{}/4] eta 0:00:01 lr 1e-3 wd 0.05 loss 2.0 (2.0) grad_norm {}\n"
    (tmp_path / "log.txt").write_text(line.format(2, 9.0) + line.format(4, 8.0) + line.format(2, 1.0))
    assert read_run(tmp_path)["grad_norm"] == [(0.5, 0, 1.0), (1, 0, 8.0)]


@pytest.mark.parametrize("by", ["epoch", "time"])
def test_runs_are_drawn_over_each_other(by, digits_run, tmp_path):
    log = tmp_path / "log_rank0.txt"
    log.write_text("\n".join(LOG))
    found = curves([str(digits_run), str(log)], by, 2, str(tmp_path))
    assert list(found) == ["default", "log_rank0.txt"]
    assert json.loads((tmp_path / "curves.json").read_text())["log_rank0.txt"]["acc1"] == [[0, 1.5, 1.25], [2, 25, 12]]
    for kind in ("pdf", "png"):
        assert (tmp_path / f"curves.{kind}").stat().st_size > 1000


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name / "default"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "train_loss": 2.0, "seconds": 1}) + "\n")
    runs = [str(tmp_path / name / "default") for name in ("a", "b")]
    assert list(curves(runs, "epoch", 1, str(tmp_path))) == ["a/default", "b/default"]
    with pytest.raises(UserError, match="named twice"):
        curves([runs[0], runs[0]], "epoch", 1, str(tmp_path))


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="no run '.*absent'"):
        read_run(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("nothing of training\n")
    with pytest.raises(UserError, match=r"notes.txt' has no epoch"):
        read_run(tmp_path / "notes.txt")
