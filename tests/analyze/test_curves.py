"""Curves: of our runs' folders and of text logs, and that they are drawn."""

import json

import pytest
from matplotlib.figure import Figure

from vmamba.analysis.curves import curves, describe, read_log, read_run
from vmamba.analysis.plotting import COLOURS
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


def test_the_held_out_loss_is_read_under_its_older_and_its_newer_name(tmp_path):
    entries = [
        {"epoch": 1, "seconds": 3600, "train_loss": 3.0, "loss": 2.0, "ema_loss": 2.5},
        {"epoch": 2, "seconds": 3600, "train_loss": 2.0, "val_loss": 1.0, "ema_val_loss": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    series = read_run(tmp_path)
    assert series["train_loss"] == [(1, 1, 3.0), (2, 2, 2.0)]
    assert series["val_loss"] == [(1, 1, 2.0), (2, 2, 1.0)]
    assert series["ema_val_loss"] == [(1, 1, 2.5), (2, 2, 1.5)]


@pytest.mark.parametrize("by", ["epoch", "time"])
def test_runs_are_drawn_over_each_other(by, digits_run, tmp_path):
    log = tmp_path / "log_rank0.txt"
    log.write_text("\n".join(LOG))
    found = curves([str(digits_run), str(log)], by=by, smooth=2, output=str(tmp_path))
    assert list(found) == ["default", "log_rank0.txt"]
    assert json.loads((tmp_path / "curves.json").read_text())["log_rank0.txt"]["acc1"] == [[0, 1.5, 1.25], [2, 25, 12]]
    for kind in ("pdf", "png"):
        assert (tmp_path / f"curves.{kind}").stat().st_size > 1000


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved meanwhile."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **settings: figures.append(figure))
    return figures


def test_the_legend_of_many_runs_covers_no_curve(drawn, tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"epoch": epoch, "seconds": 60, "train_loss": epoch % 3, "val_loss": 3 - epoch % 3}) + "\n"
                for epoch in range(1, 20)
            )
        )
    curves([str(tmp_path / name) for name in "abcd"], output=str(tmp_path))
    figure = drawn[0]
    figure.draw_without_rendering()
    legends = [legend.get_window_extent() for legend in figure.legends]
    assert [len(legend.get_texts()) for legend in figure.legends] == [4, 2]  # runs, and kinds of lines
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not any(axes.get_window_extent().overlaps(legend) for legend in legends)


@pytest.mark.parametrize("count", [2, 9])
def test_no_two_runs_are_drawn_alike(count, drawn, tmp_path):
    entry = {"epoch": 1, "seconds": 60, "train_loss": 2.0}
    lines = "".join(json.dumps(entry | {"epoch": epoch}) + "\n" for epoch in range(1, 5))
    for number in range(count):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "metrics.jsonl").write_text(lines)
    curves([str(tmp_path / f"{number}") for number in range(count)], output=str(tmp_path))
    styles = [(line.get_color(), line.get_marker()) for line in drawn[0].axes[0].lines]
    assert len(set(styles)) == len(styles) == count
    assert {colour for colour, _ in styles} <= {*COLOURS}
    assert styles == [(line.get_color(), line.get_marker()) for line in drawn[0].legends[0].get_lines()]


@pytest.mark.parametrize(
    ("seconds", "unit", "last"), [(30, "seconds", 60), (70, "minutes", 140 / 60), (4000, "hours", 8 / 3.6)]
)
def test_time_is_in_a_unit_that_fits(seconds, unit, last, drawn, tmp_path):
    entries = [{"epoch": epoch, "seconds": seconds, "train_loss": 2.0} for epoch in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    curves([str(tmp_path)], by="time", output=str(tmp_path))
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == unit
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(last)


def test_a_text_log_says_how_many_parameters_and_not_what_data(tmp_path):
    (tmp_path / "log.txt").write_text("\n".join(LOG))
    assert describe(tmp_path / "log.txt") == "22.9M parameters, data unknown"
    (tmp_path / "log.txt").write_text("\n".join(LOG[1:]))
    assert describe(tmp_path / "log.txt") == "model and data unknown"


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name / "default"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "train_loss": 2.0, "seconds": 1}) + "\n")
    runs = [str(tmp_path / name / "default") for name in ("a", "b")]
    assert list(curves(runs, output=str(tmp_path))) == ["a/default", "b/default"]
    with pytest.raises(UserError, match="named twice"):
        curves([runs[0], runs[0]], output=str(tmp_path))


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="no run '.*absent'"):
        read_run(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("nothing of training\n")
    with pytest.raises(UserError, match=r"notes.txt' has no epoch"):
        read_run(tmp_path / "notes.txt")


DAMAGED = [
    (LOG[1].replace("2024-01-01", "2024-13-01"), "'2024-13-01 10:00:00' is no date or number in the line '.2024-13-01"),
    (LOG[1].replace("lr 1e-06", "lr 1.2.3"), "'1.2.3' is no date or number in the line"),
    (LOG[1].replace("(7.1)", "(7,1)"), "'7,1' is no date or number in the line"),
    (LOG[1].replace("grad_norm 1.5", "grad_norm 1.5\x00"), r"'1.5\\x00' is no date or number in the line"),
]


@pytest.mark.parametrize(("line", "sentence"), DAMAGED)
def test_a_damaged_line_of_a_log_is_named(line, sentence, tmp_path):
    assert line != LOG[1]
    path = tmp_path / "log_rank0.txt"
    path.write_text("\n".join([*LOG, line]))
    with pytest.raises(UserError, match=f"{sentence}.*' of {path}; mend or remove it"):
        read_run(path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seconds": None}, "metrics.jsonl' has None for seconds in the round of epoch 1, which is no number; mend"),
        ({"lr": "1e-3"}, "has '1e-3' for lr in the round of epoch 1"),
        ({"loss": [2.0]}, r"has \[2.0\] for val_loss in the round of epoch 1"),
    ],
)
def test_a_damaged_round_is_named(changed, sentence, tmp_path):
    entry = {"epoch": 1, "train_loss": 2.0, "acc1": None, "seconds": 3600}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry | changed) + "\n")
    with pytest.raises(UserError, match=sentence):
        read_run(tmp_path)


def test_bytes_of_a_log_that_are_no_text_do_not_matter(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "train_loss": 2.0, "seconds": 3600}) + "\n")
    step = LOG[1].encode()
    (tmp_path / "log.txt").write_bytes(b"of a user called \xe9\n" + step + b"\n")
    assert read_run(tmp_path)["grad_norm"] == [(0, 0, 1.5)]
