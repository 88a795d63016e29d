"""analyze/ablate.py: runs over seeds as one table; what is done is not done again."""

import json
import os
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.classification.tiny import tiny_file
from vmamba.analysis import ablation
from vmamba.analysis.ablation import Repetition, Runs, ablate
from vmamba.analysis.tables import replace_table
from vmamba.config.command_line import argument_parser, config_from_args
from vmamba.errors import UserError
from vmamba.runtime.stop import Stopped


@pytest.fixture
def configs(tmp_path):
    base = tiny_file(tmp_path)
    for name, drop in (("one", 0.0), ("two", 0.1)):
        (tmp_path / f"{name}.yaml").write_text(f"BASE: {base.name}\nMODEL:\n  DROP_PATH_RATE: {drop}\n")
    return [str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]


def pretend(monkeypatch, fail=()):
    """Programs that write what a run leaves, of an accuracy that is 10 x the config's number + the seed."""
    calls = []

    def call(self, arguments, place):
        calls.append(arguments)
        config = Path(arguments[1])
        given = dict(pairwise(arguments))
        seed, folder = int(given["--seed"]), Path(given["--output"], config.stem, given["--tag"])
        if config.stem in fail:
            return "it broke"
        folder.mkdir(parents=True, exist_ok=True)
        repetition = Repetition(str(config), seed, (), given["--output"])
        (folder / "config.yaml").write_text(repetition.config.dump())
        acc = 10.0 * (1 + (config.stem == "two")) + seed
        lines = [
            {"epoch": n, "step": n, "images_per_second": 5.0 * n, "memory_mb": 3.0, "seconds": 1.0} for n in (1, 3)
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        by = {"devices": ["a device"], "versions": {"torch": "2"}, "started": "2026-11-27T00:00:00"}
        told = {"results": {"acc1": acc, "acc5": 50.0}, "details": {"macro_f1": acc / 2, "class_images": [1]}, "by": by}
        (folder / "evaluation.json").write_text(json.dumps(told))
        return None

    monkeypatch.setattr(Runs, "_call", call)
    return calls


def test_a_line_a_config_with_mean_and_deviation_over_seeds(configs, tmp_path, monkeypatch, capsys):
    calls, page = pretend(monkeypatch), tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end -->\nbehind\n")
    output = str(tmp_path / "out")
    one, two = ablate(configs, seeds=(0, 2), output=output, columns=("acc1", "macro_f1"), page=str(page), jobs=2)
    assert (one["config"], one["seeds"], one["acc1"], one["macro_f1"]) == ("one", 2, "11.00 ± 1.41", "5.50 ± 0.71")
    assert (two["acc1"], two["images/s"], two["memory (MB)"]) == ("21.00 ± 1.41", 10.0, 3.0)
    assert "acc5" not in one and [*one][:3] == ["config", "parameters (M)", "seeds"]
    assert len(calls) == 8 and sum("--eval" in call for call in calls) == 4
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "over seeds 0, 2" in text and "a device, PyTorch 2, 2026-11-27" in text and text in capsys.readouterr().out
    assert page.read_text() == f"before\n<!-- table -->\n\n{text}\n<!-- end -->\nbehind\n"
    assert [run["seed"] for run in json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"]] == [0, 0, 2, 2]
    ablate(configs, seeds=(0, 2, 3), output=output)
    assert len(calls) == 12  # the third seed alone


def test_what_is_evaluated_are_the_last_weights_and_not_those_to_begin_with(configs, tmp_path, monkeypatch):
    calls, output = pretend(monkeypatch), tmp_path / "out"
    with open(configs[0], "a") as file:
        file.write("  PRETRAINED: began.pth\n  WEIGHTS: ema\n")
    ablate(configs[:1], output=str(output))
    config = config_from_args(argument_parser().parse_args(calls[1]))
    folder = output / "one" / "seed0"
    assert (True, str(folder / "last.pth")) == (config.EVAL_MODE, config.MODEL.RESUME)
    assert config.MODEL.WEIGHTS == "auto"  # that of the file to begin with holds no average here
    told = json.loads((folder / "result.json").read_text())
    for checkpoint, again in ((str(folder / "last.pth"), 0), ("began.pth", 2)):  # as they were once written
        (folder / "result.json").write_text(json.dumps(told | {"checkpoint": checkpoint}))
        del calls[:]
        ablate(configs[:1], output=str(output))
        assert len(calls) == again


def test_a_null_is_no_unknown_column_and_configs_may_find_other_numbers(configs, tmp_path, monkeypatch):
    pretend(monkeypatch)
    output = tmp_path / "out"
    ablate(configs, seeds=(0, 1), output=str(output))
    for name, changes in (("one/seed0", {"macro_f1": None}), ("two/seed0", {"macro_f1": None, "ema_acc1": 7.0})):
        file = output / name / "result.json"
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {"details": told["details"] | changes}))
    for columns in ((), ("acc1", "macro_f1", "ema_acc1")):
        one, two = ablate(configs, seeds=(0, 1), output=str(output), columns=columns)
        assert (one["macro_f1"], one["ema_acc1"], two["ema_acc1"]) == ("5.50 (1 of 2)", None, "7.00 (1 of 2)")
    row, _ = ablate(configs, seeds=(0,), output=str(output), columns=("macro_f1",))
    assert row["macro_f1"] is None


def test_a_seed_whose_evaluation_does_not_count_is_left_out_and_told(configs, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch)
    output, file = tmp_path / "out", tmp_path / "out" / "one" / "seed0" / "result.json"
    ablate(configs, seeds=(0, 1, 2), output=str(output))
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"results": {"val_loss": None, "acc1": 90.0, "acc5": 50}}))
    one, two = ablate(configs, seeds=(0, 1, 2), output=str(output), columns=("acc1", "acc5", "macro_f1", "val_loss"))
    assert one["seeds"] == 3 and one["acc1"] == "11.50 ± 0.71 (2 of 3)" and one["val_loss"] is None
    assert one["macro_f1"] == "5.75 ± 0.35 (2 of 3)" and two["acc1"] == "21.00 ± 1.00"
    text = (output / "ablation.md").read_text()
    assert "Left out, since the evaluation does not count: a loss or a result was not finite: one, seed 0." in text
    alone = ablate(configs[:1], seeds=(0,), output=str(output), columns=("macro_f1",))
    assert alone[0]["macro_f1"] is None  # and no unknown column
    file.write_text(json.dumps(told | {"results": {"acc1": 50}}))  # a whole number is one
    assert ablate(configs[:1], seeds=(0,), output=str(output))[0]["acc1"] == "50.00"


def test_a_damaged_result_is_a_sentence(configs, tmp_path, monkeypatch):
    pretend(monkeypatch)
    output, file = tmp_path / "out", tmp_path / "out" / "one" / "seed0" / "result.json"
    (row,) = ablate(configs[:1], output=str(output))
    told = json.loads(file.read_text())
    for content, part in (
        (None, "results"), ({}, "results"), (told | {"results": {"acc1": "50"}}, "results"),
        (told | {"details": None}, "details"), (told | {"by": None}, "by"), (told | {"memory_mb": "3"}, "memory_mb"),
        (told | {"by": told["by"] | {"devices": []}}, "by"),
    ):  # fmt: skip
        file.write_text(json.dumps(content))
        with pytest.raises(
            UserError, match=f"one/seed0/result.json' does not tell '{part}' as a finished run does; remove"
        ):
            ablate(configs[:1], output=str(output))
    del told["memory_mb"]
    file.write_text(json.dumps(told))
    assert ablate(configs[:1], output=str(output)) == [row | {"memory (MB)": None}]


def test_models_are_timed_alone(configs, tmp_path, monkeypatch):
    pretend(monkeypatch)
    compare = ablation.speed.compare
    few = {"warm_up": 1, "repeats": 2}
    monkeypatch.setattr(ablation.speed, "compare", lambda *args, **options: compare(*args, **options | few))
    rows = ablate(configs, output=str(tmp_path / "out"), timed=True)
    assert all(row["images/s"] != 10.0 and row["images/s, forward"] > 0 for row in rows)
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "of steps of 10 random images, the models taking turns, alone on the device" in text
    boxes = tmp_path / "boxes.yaml"
    boxes.write_text("TASK: detection\n")
    with pytest.raises(UserError, match="--timed times models of classification, and these are of detection"):
        ablate([str(boxes)], output=str(tmp_path / "other"), timed=True)


def test_a_run_that_fails_stops_no_other(configs, tmp_path, monkeypatch):
    pretend(monkeypatch, fail=("one",))
    with pytest.raises(UserError, match="1 run failed; one, seed 0: it broke"):
        ablate(configs, output=str(tmp_path / "out"))
    assert "| two |" in (tmp_path / "out" / "ablation.md").read_text()
    whole = ablation.read_run
    with monkeypatch.context() as patch:  # of one of two runs that share a thread
        patch.setattr(ablation, "read_run", lambda folder: whole(folder) if folder.parent.name == "two" else {}["x"])
        pretend(patch)
        with pytest.raises(UserError, match="1 run failed; one, seed 0: its results cannot be read .KeyError: 'x'."):
            ablate(configs, output=str(tmp_path / "third"))
    assert "| two |" in (tmp_path / "third" / "ablation.md").read_text()
    pretend(monkeypatch, fail=("one", "two"))
    with pytest.raises(UserError, match="none of the 2 runs could be made"):
        ablate(configs, output=str(tmp_path / "other"))


def test_what_cannot_be_is_told_before_anything_is_run(configs, tmp_path, monkeypatch):
    calls, output = pretend(monkeypatch), str(tmp_path / "out")
    ablate(configs[:1], output=output)
    del calls[:]
    for changed, sentence in (
        (
            {"options": ["TRAIN.EPOCHS", "7"]},
            "a run of TRAIN.EPOCHS 2, and 7 is asked for; choose another",
        ),
        ({"configs": [configs[0], configs[0]]}, "runs of one name and seed would be one: one, one"),
        ({"seeds": (1, 1)}, "runs of one name and seed would be one"),
        ({"options": ["TRAIN.EPOCS", "7"]}, "unknown config key"),
        ({"options": ["TRAIN.EPOCHS", "2", "SEED", "4"]}, "--opts sets SEED, and seeds are given by --seeds; leave it"),
        ({"options": ["DRY_RUN", "true"]}, "DRY_RUN is true in '.*' or --opts, and a run is to train; leave it out"),
        ({"options": ["EVAL_MODE", "true"]}, "EVAL_MODE is true in '.*' or --opts"),
        ({"options": ["TAG", "x"]}, "--opts sets TAG, and a run's is its seed's; leave it out"),
        ({"options": ["OUTPUT", "x"]}, "--opts sets OUTPUT, and --output gives it; leave it out"),
        ({"page": "nowhere.md"}, "cannot read 'nowhere.md'"),
    ):
        with pytest.raises(UserError, match=sentence):
            ablate(**{"configs": configs[:1], "output": output} | changed)
    assert not calls
    unknown = "unknown column 'macro'; --eval finds acc1, acc5, macro_f1"
    with pytest.raises(UserError, match=unknown):
        ablate(configs, output=output, columns=("macro",))
    assert not calls
    with pytest.raises(UserError, match=unknown):  # at the first run's end where nothing told it before
        ablate(configs, output=str(tmp_path / "new"), columns=("macro",))
    assert len(calls) == 2 and not (tmp_path / "new" / "ablation.md").exists()
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(UserError, match="has no lines <!-- table --> and <!-- end -->"):
        replace_table(tmp_path / "page.md", "")


def test_of_several_gpus_the_runs_use_one_each_in_turn(monkeypatch):
    monkeypatch.setattr(ablation.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in ablation._places(3)] == ["4", "7", "4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in ablation._places(3)] == ["0", "1", "0"]
    monkeypatch.setattr(ablation.torch.cuda, "device_count", lambda: 0)
    assert ablation._places(2) == [{}, {}]


RUN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM; saved"))
pathlib.Path(sys.argv[0], sys.argv[sys.argv.index("--tag") + 1]).touch()
time.sleep(60)
"""


def test_a_stopped_command_stops_its_runs_and_begins_no_other(configs, tmp_path, monkeypatch, capsys):
    begun = tmp_path / "begun"
    begun.mkdir()
    monkeypatch.setattr(ablation, "PROGRAM", (sys.executable, "-c", RUN.replace("sys.argv[0]", repr(str(begun)))))

    def stop_us():
        while len([*begun.iterdir()]) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_us).start()
    with pytest.raises(Stopped):
        ablate(configs[:1], seeds=(0, 1, 2), jobs=2, output=str(tmp_path / "out"))
    assert sorted(path.name for path in begun.iterdir()) == ["seed0", "seed1"]
    said = capsys.readouterr().out
    assert "stopping 2 runs, which save; the same command goes on" in said
    assert not [*(tmp_path / "out").rglob("result.json")]


def test_a_run_is_main_py_with_the_seed_and_the_options(tmp_path, configs):
    repetition = Repetition(configs[0], 4, ("TRAIN.EPOCHS", "1"), str(tmp_path / "out"))
    assert Runs()._call(repetition.command, {}) is None
    (start,) = json.loads((repetition.folder / "run.json").read_text())["starts"]
    assert start["end"] == "finished, 3 of 3 steps" and start["seed"] == 4
    repetition.check()  # what is there is what is wanted
