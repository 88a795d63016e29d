"""analyze/compare.py: tables of runs, by hand."""

import json

import pytest

from vmamba.analysis.comparison import compare
from vmamba.config import get_config
from vmamba.errors import UserError


def make_run(folder, accuracies, *options):
    config = get_config(None, list(options))
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
    assert plain["run"] == "a/0 and 1 more" and plain["seeds"] == 2
    assert plain["best acc1"] == "62.00 ± 2.83" and plain["last acc1"] == "61.00 ± 4.24"  # sqrt 8, sqrt 18
    assert plain["images/s"] == 200 and plain["memory (MB)"] == 53 and plain["hours"] == 1.5
    assert other["best acc1"] == "40.00" and other["hours"] == 0.5
    settings = {key: (plain[key], other[key]) for key in plain if key.startswith(("TRAIN.", "MODEL."))}
    assert settings == {"TRAIN.EPOCHS": ("300", "5"), "MODEL.OPTIONS.d_state": ("–", "8")}
    assert not {"SEED", "TAG"} & plain.keys()
    assert (tmp_path / "out" / "compare.md").read_text() in capsys.readouterr().out


def test_what_is_no_run_is_a_sentence(tmp_path):
    run = make_run(tmp_path / "a" / "0", [50.0])
    with pytest.raises(UserError, match="holds no config.yaml; name the folder of a run"):
        compare([run, str(tmp_path)], output=str(tmp_path))
    (tmp_path / "a" / "0" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="holds no round of training yet; leave it out"):
        compare([run], output=str(tmp_path))
    run, detection = make_run(tmp_path / "b", [1.0]), make_run(tmp_path / "c", [1.0], "TASK", "detection")
    with pytest.raises(UserError, match="results of several kinds .*; give those of one task"):
        compare([run, detection], output=str(tmp_path))
