"""Several processes, by each launcher: the curve of one process, every image counted once, jobs that resume."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vmamba.config import output_folder
from vmamba.errors import UserError
from vmamba.runtime.checkpoint import read_checkpoint
from vmamba.runtime.shares import one_file, read_folder
from vmamba.runtime.trainer import run

from ..forked import start, together
from .tiny import ALONE, ROOT, command, differences, log, metrics, saved, tiny_config, tiny_file

WITHOUT_CHANCE = ("MODEL.DROP_PATH_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0)  # drawn by each process for itself
WITHOUT_CHANCE += ("TRAIN.CLIP_GRAD", 0.3)  # what the gradients' norms are above
IN_SHARES = ("TRAIN.PARALLEL", "fsdp", "MODEL.BACKEND", "reference", "KEEP_LAST", "3")
PARTS = {"random_states": None, "config": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def one_process(folder):
    config = tiny_config(folder, *WITHOUT_CHANCE, "TAG", "one")
    return config, run(config)


@pytest.fixture(scope="module")
def two_processes(folder):
    """Trained from the root by torchrun, with the global batch of `one_process` in two steps of accumulation too."""
    options = [*map(str, WITHOUT_CHANCE), "TAG", "two", "DATA.BATCH_SIZE", "5"]
    launch("torchrun", command(folder, "--opts", *options)[1:], ROOT)
    return tiny_config(folder, *options)


@pytest.fixture(scope="module")
def in_shares(folder):
    """The same under FSDP, every gradient being clipped."""
    options = [*map(str, WITHOUT_CHANCE), "TAG", "fsdp", "DATA.BATCH_SIZE", "5", *IN_SHARES]
    together(29621, *command(folder, "--opts", *options)[1:])
    return tiny_config(folder, *options)


def launch(launcher, arguments, cwd):
    launchers = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"],
        "launch": ["-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", "29618"],
    }
    done = subprocess.run(
        [sys.executable, *launchers[launcher], *arguments], capture_output=True, timeout=300, **{**ALONE, "cwd": cwd}
    )
    assert done.returncode == 0, done.stderr
    assert "Grad strides" not in done.stderr  # DistributedDataParallel copies such gradients, and says so on every rank
    return done.stdout


def test_two_processes_give_the_curve_of_one(one_process, two_processes):
    config, _ = one_process
    for one, two in zip(metrics(config), metrics(two_processes), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    for key in ("model", "model_ema"):
        for name, weight in saved(config)[key].items():
            torch.testing.assert_close(saved(two_processes)[key][name], weight, rtol=1e-4, atol=1e-6)


def test_in_shares_two_processes_give_the_curve_of_one(one_process, in_shares, tmp_path):
    config, _ = one_process
    for one, two in zip(metrics(config), metrics(in_shares), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    folder = output_folder(in_shares) / "last.sharded"
    assert len([*folder.glob("*.distcp")]) == 2 and not (output_folder(in_shares) / "last.pth").exists()
    one_file(str(folder), str(tmp_path / "all.pth"))
    whole = read_checkpoint(tmp_path / "all.pth")
    assert not differences({**whole, **PARTS}, {**read_folder(folder), **PARTS})
    for key in ("model", "model_ema"):
        for name, weight in saved(config)[key].items():
            torch.testing.assert_close(whole[key][name], weight, rtol=1e-4, atol=1e-6)
    moments = saved(config)["optimizer"]["state"]
    for index, values in whole["optimizer"]["state"].items():
        torch.testing.assert_close(values, moments[index], rtol=1e-3, atol=1e-7)
    assert whole.keys() == saved(config).keys()


def test_a_state_in_shares_goes_on_in_one_process_and_in_shares_again(folder, one_process, in_shares):
    config, results = one_process
    first = output_folder(in_shares) / "last.3.sharded"  # of the first epoch
    alone = tiny_config(folder, *WITHOUT_CHANCE, "TAG", "from shares", "MODEL.RESUME", first)
    assert run(alone) == pytest.approx(results, rel=1e-5)
    options = [*map(str, WITHOUT_CHANCE), "TAG", "again", "DATA.BATCH_SIZE", "5", *IN_SHARES]
    last = str(output_folder(config) / "last.2.pth")  # a file into shares
    together(29622, *command(folder, "--resume", last, "--opts", *options)[1:])
    again = tiny_config(folder, *options)
    assert metrics(again)[-1] == pytest.approx(metrics(config)[-1], rel=1e-5)
    with pytest.raises(UserError, match="is a state in shares; make it a file first: python analyze/one_file.py"):
        run(tiny_config(folder, "TAG", "again", "EVAL_MODE", True))


def test_one_process_writes_and_all_are_saved(two_processes):
    steps = [line for line in log(two_processes).splitlines() if "train [" in line]
    assert len(steps) == 6
    assert "2 processes on CPU" in log(two_processes)
    first, second = saved(two_processes)["random_states"]
    assert not torch.equal(first["torch"], second["torch"])


def test_from_classification_the_old_launcher_evaluates_every_image_once(folder, one_process):
    config, results = one_process
    checkpoint = str(output_folder(config) / "last.pth")
    arguments = ["--cfg", str(tiny_file(folder)), "--output", str(folder), "--eval", "--resume", checkpoint]
    out = launch("launch", ["main.py", *arguments, "--batch-size", "5"], ROOT / "classification")
    (line,) = [line for line in out.splitlines() if "last.pth: " in line]
    assert re.findall(r"top-1 ([\d.]+)%", line) == [f"{results[key]:.2f}" for key in ("acc1", "ema_acc1")]
    assert re.findall(r"loss ([\d.]+)", line) == [f"{results[key]:.4f}" for key in ("val_loss", "ema_val_loss")]
    alone = tiny_config(folder, "EVAL_MODE", True, "MODEL.RESUME", checkpoint)
    tables = [output_folder(alone) / kind / "predictions.csv" for kind in ("predictions", "ema_predictions")]
    of_two = [predictions(path) for path in tables]
    run(alone)
    for two, one in zip(of_two, map(predictions, tables), strict=True):  # whichever process saw which
        assert [row[:3] for row in two] == [row[:3] for row in one] and len(two) == 13
        chances = [[*map(float, row[3:])] for row in one[1:]]
        assert [[*map(float, row[3:])] for row in two[1:]] == [pytest.approx(row, abs=1e-5) for row in chances]


def predictions(path):
    with path.open(newline="") as file:
        return [*csv.reader(file)]


def test_a_local_job_warned_in_time_is_requeued_and_resumes(folder, one_process):
    config = tiny_config(folder, *WITHOUT_CHANCE, "TAG", "job")
    submission = command(folder, "--local", "--gpus-per-node", "0", "--time", "30", door="classification/submit.py")
    written = output_folder(config) / "log.txt"
    with subprocess.Popen(
        [*submission, "--tag", "job", "--opts", *map(str, WITHOUT_CHANCE)], stdout=subprocess.PIPE, **ALONE
    ) as door:
        job = int(re.match(r"job (\d+);", door.stdout.readline()).group(1))
        while not (written.exists() and "][1/3]" in written.read_text()):
            assert door.poll() is None
            time.sleep(0.005)
        (task,) = Path(f"/proc/{job}/task/{job}/children").read_text().split()
        os.kill(int(task), signal.SIGUSR2)
        out, _ = door.communicate(timeout=300)
    assert door.returncode == 0
    assert f"job {job} is done" in out
    assert f"resumed {output_folder(config) / 'last.pth'}" in log(config)
    assert metrics(config) == metrics(one_process[0])


def test_running_statistics_are_those_of_the_checkpoint_on_every_process(folder):
    """Each process's differ in training; evaluation and checkpoint have rank 0's."""
    options = ("TAG", "bn", "MODEL.OPTIONS.norm_layer", "bn", "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 4)
    together(29623, *command(folder, "--opts", *map(str, options))[1:])
    config = tiny_config(folder, *options)
    results = run(tiny_config(folder, *options, "EVAL_MODE", True))
    assert results == pytest.approx({key: metrics(config)[-1][key] for key in results}, rel=1e-5)


ENDING = """
import os, signal
from vmamba.runtime.step import OptimizerStep

step = OptimizerStep.__call__

def ending(self, state, *args, **options):
    if state.step == 4 and self.world.rank == 1:
        HOW
    return step(self, state, *args, **options)

OptimizerStep.__call__ = ending
"""


@pytest.mark.parametrize(
    ("launcher", "how", "said"),
    [
        ("none", "os.kill(os.getpid(), signal.SIGKILL)", "has ended without a word: it was killed"),
        ("launch", "1 / 0", "has ended: ZeroDivisionError: division by zero"),
    ],
)
def test_a_process_that_dies_takes_the_run_with_it_and_is_named(folder, tmp_path, launcher, how, said):
    """Where nobody watches the processes, too, and with loading processes, which outlive theirs."""
    (tmp_path / "ending.py").write_text(ENDING.replace("HOW", how))
    arguments = command(folder, "--tag", launcher, "--batch-size", "4", "--workers", "2", "--import", "ending")
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    if launcher == "none":
        started = start(29619, *arguments[1:], **path)
    else:
        two = ("-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", "29620")
        alone = {**ALONE, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "env": {**ALONE["env"], **path}}
        started = [subprocess.Popen([sys.executable, *two, *arguments[1:]], **alone)]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == ([1, -signal.SIGKILL] if launcher == "none" else [1])
    assert re.search(f"error: process 1 on .* {said}", errors[0])
    written = log(tiny_config(folder, "TAG", launcher))
    assert len(re.findall(f"ERROR the run ends: process 1 on .* {said}", written)) == 1
    if launcher == "launch":
        assert errors[0].index("1 / 0") < errors[0].index("error: process 1")  # the reason first
        assert "1 / 0" in written
