"""analyze/compare.py: tables of runs, by hand."""

import json
from pathlib import Path

import pytest

from vmamba.analysis.comparison import compare
from vmamba.config import get_config
from vmamba.errors import UserError


def make_run(folder, accuracies, *options):
    config = get_config(None, ["TRAIN.EPOCHS", 1, *options])  # those of more are not at their end
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump())
    lines = [
        {
            "epoch": n,
            "step": 10 * n,
            "acc1": acc,
            "images_per_second": 100.0 * n,
            "memory_mb": 50.0 + n,
            "seconds": 1800,
        }
        for n, acc in enumerate(accuracies, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_repetitions_are_one_line_and_differences_are_columns(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "a" / "0", [50.0, 60.0, 58.0], "SEED", 0, "TAG", "0"),
        make_run(tmp_path / "a" / "1", [50.0, 62.0, 64.0], "SEED", 1, "TAG", "1"),
        make_run(tmp_path / "a" / "b", [40.0], "TRAIN.EPOCHS", 5, "MODEL.OPTIONS.d_state", 8),
    ]
    plain, other = compare(runs, output=str(tmp_path / "out"))
    assert plain["run"] == "a/0 and 1 more" and plain["runs"] == plain["seeds"] == 2
    assert plain["best acc1"] == "62.00 ± 2.83" and plain["last acc1"] == "61.00 ± 4.24"  # sqrt 8, sqrt 18
    assert plain["images/s"] == 200 and plain["memory (MB)"] == 53 and plain["hours"] == 1.5
    assert other["best acc1"] == "40.00" and other["hours"] == 0.5
    settings = {key: (plain[key], other[key]) for key in plain if key.startswith(("TRAIN.", "MODEL."))}
    assert settings == {"TRAIN.EPOCHS": ("1", "5"), "MODEL.OPTIONS.d_state": ("–", "8")}
    assert not {"SEED", "TAG"} & plain.keys()
    assert (tmp_path / "out" / "compare.md").read_text() in capsys.readouterr().out


def test_rounds_without_a_number_or_that_do_not_count_are_left_out(tmp_path):
    """An evaluation made anew after it had failed has no rate; one that found NaN does not count."""
    runs = [
        make_run(tmp_path / "a" / "0", [50.0, 60.0, 58.0], "SEED", 0, "TAG", "0"),
        make_run(tmp_path / "a" / "1", [40.0], "SEED", 1, "TAG", "1"),
        make_run(tmp_path / "b" / "0", [30.0], "TRAIN.EPOCHS", 5),
    ]
    anew = {"epoch": 4, "step": 40, "acc1": 61.0, "images_per_second": None, "memory_mb": None, "seconds": None}
    diverged = {"epoch": 2, "step": 20, "acc1": 99.0, "val_loss": None}
    trained = {"epoch": 3, "step": 30, "train_loss": None}  # not evaluated
    for run, *entries in (
        (runs[0], anew),
        (runs[1], diverged, trained),
        (runs[2], {**diverged, "epoch": 1, "step": 10}),
    ):
        lines = [] if run == runs[2] else [(Path(run) / "metrics.jsonl").read_text()]
        (Path(run) / "metrics.jsonl").write_text("".join([*lines, *(json.dumps(entry) + "\n" for entry in entries)]))
    one, other = compare(runs, output=str(tmp_path / "out"))
    assert (one["best acc1"], one["last acc1"]) == ("50.50 ± 14.85", "61.00 (1 of 2)")
    assert one["images/s"] == 150 and one["hours"] == 1.0
    assert (other["best acc1"], other["last acc1"], other["images/s"], other["hours"]) == (None, None, None, 0)


def test_columns_of_averages_are_there_where_one_run_has_them(tmp_path):
    runs = [make_run(tmp_path / name, [50.0], "TRAIN.EPOCHS", n) for n, name in enumerate("ab", 1)]
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "step": 20, "acc1": 51.0, "ema_acc1": 52.0}\n')
    plain, averaged = compare(runs, output=str(tmp_path / "out"))
    assert (plain["best ema_acc1"], averaged["best ema_acc1"], averaged["last acc1"]) == (None, "52.00", "51.00")


def test_a_folder_counts_once_and_seeds_are_told_beside_runs(tmp_path):
    run = make_run(tmp_path / "a" / "0", [50.0], "SEED", 3, "TAG", "0")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "0")
    again = [f"{run}/", f"{tmp_path}/a/../a/0", str(tmp_path / "link")]
    (row,) = compare([run, *again], output=str(tmp_path / "out"))
    assert (row["run"], row["runs"], row["seeds"], row["best acc1"]) == ("a/0", 1, 1, "50.00")
    twin = make_run(tmp_path / "a" / "1", [52.0], "SEED", 3, "TAG", "1")
    (row,) = compare([run, twin], output=str(tmp_path / "out"))
    assert (row["runs"], row["seeds"]) == (2, 1)


def test_what_trained_nothing_is_left_out_and_named(tmp_path, capsys):
    run = make_run(tmp_path / "a" / "0", [50.0])
    refused, begun = tmp_path / "a" / "refused", Path(make_run(tmp_path / "a" / "begun", []))
    refused.mkdir()
    (refused / "log.txt").touch()
    (row,) = compare([run, str(begun), str(refused)], output=str(tmp_path / "out"))
    text = (tmp_path / "out" / "compare.md").read_text()
    assert row["runs"] == 1 and text in capsys.readouterr().out
    assert f"Left out: '{begun}' holds no round of training yet.\n" in text
    assert f"Left out: '{refused}' holds a start that trained nothing (its log.txt says why).\n" in text


def test_a_run_that_is_not_at_its_end_is_a_line_of_its_own(tmp_path):
    """By the epochs or the steps of its config, and whether its patience ended it; the others' mean is without it."""
    epochs = [
        make_run(tmp_path / "a" / f"{seed}", [acc], "TRAIN.EPOCHS", total, "SEED", seed, "TRAIN.PATIENCE", 2)
        for seed, (acc, total) in enumerate([(50.0, 3), (10.0, 3), (60.0, 3)])
    ]
    for run, told in zip(
        epochs, ({"epoch": 3}, {"epoch": 1.5, "unimproved": 1}, {"epoch": 2, "unimproved": 2}), strict=True
    ):
        with (Path(run) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 30, "acc1": 40.0} | told) + "\n")
    steps = [
        make_run(tmp_path / "b" / f"{seed}", [20.0] * rounds, "TRAIN.STEPS", 2000, "SEED", seed)
        for seed, rounds in enumerate((200, 199))
    ]
    rows = compare([*epochs, *steps], output=str(tmp_path / "out"))
    told = {row["run"]: (row["runs"], row["unfinished"], row["best acc1"]) for row in rows}
    assert told == {
        "a/0 and 1 more": (2, None, "55.00 ± 7.07"),
        "a/1": (1, "1.50 of 3 epochs", "40.00"),
        "b/0": (1, None, "20.00"),
        "b/1": (1, "1,990 of 2,000 steps", "20.00"),
    }
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "\nNot finished, so in no mean over seeds: 'a/1', 1.50 of 3 epochs.\n" in text
    assert "\nNot finished, so in no mean over seeds: 'b/1', 1,990 of 2,000 steps.\n" in text
    assert text.count("Not finished") == 2
    (row,) = compare([epochs[0], epochs[2]], output=str(tmp_path / "out"))
    assert "unfinished" not in row


def test_what_is_no_run_is_a_sentence(tmp_path):
    run = make_run(tmp_path / "a" / "0", [50.0])
    with pytest.raises(UserError, match="holds no config.yaml; name the folder of a run"):
        compare([run, str(tmp_path)], output=str(tmp_path))
    (tmp_path / "a" / "0" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="holds no round of training yet; name runs that have one"):
        compare([run], output=str(tmp_path))
    run, detection = make_run(tmp_path / "b", [1.0]), make_run(tmp_path / "c", [1.0], "TASK", "detection")
    with pytest.raises(UserError, match="results of several kinds .*; give those of one task"):
        compare([run, detection], output=str(tmp_path))
