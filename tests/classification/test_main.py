"""The doors, opened in this process: from both folders, and what they say to a mistake."""

import runpy
import sys

import pytest

from vmamba.config import output_folder

from .tiny import ROOT, metrics, tiny_config, tiny_file


@pytest.fixture
def open_door(monkeypatch, capsys):
    """open_door(arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments, door="main.py", cwd=ROOT):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [door, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(cwd / door), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "classification"], ids=["root", "classification"])
def test_both_folders_open_the_same_door(open_door, tmp_path, cwd):
    code, out, _ = open_door(
        *("--cfg", "configs/vmamba_digits.yaml", "--throughput", "--batch_size", 2, "--output", tmp_path), cwd=cwd
    )
    assert code == 0
    assert "images/s" in out


def test_flags_reach_the_run(open_door, tmp_path):
    flags = ("--output", tmp_path, "--tag", "flags", "--accumulation_steps", 3, "--model_ema", "false")
    code, out, _ = open_door("--cfg", tiny_file(tmp_path), *flags, "--optim", "sgd", "--opts", "TRAIN.EPOCHS", 1)
    assert code == 0
    assert "EMA" not in out
    config = tiny_config(tmp_path, "TAG", "flags")
    assert [line["step"] for line in metrics(config)] == [1]
    assert (output_folder(config) / "best.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--cfg", "configs/vmamba_digit.yaml"), "did you mean 'configs/vmamba_digits.yaml'?"),
        (("--cfg", "configs/vmamba_digits.yaml", "--bach-size", 2), "did you mean '--batch-size'?"),
        (("--cfg", "configs/vmamba_digits.yaml", "--opts", "TRAIN.EPOCH", 2), "did you mean 'TRAIN.EPOCHS'?"),
        (
            ("--cfg", "configs/vmamba_digits.yaml", "--opts", "MODEL.NAME", "vmamba_dig"),
            "did you mean 'vmamba_digits'?",
        ),
        (("--cfg", "configs/vmamba_digits.yaml", "--throughput", "--opts", "MODEL.BACKEND", "cuad"), "'cuda'"),
        (("--cfg", "configs/vmamba_tiny.yaml", "--data-path", "nowhere", "--batch-size", 2), "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(open_door, tmp_path, arguments, sentence):
    code, _, err = open_door(*arguments, *(() if "--opts" in arguments else ("--output", tmp_path)))
    assert code not in (0, None)
    assert len(err.splitlines()) == 1
    assert sentence in err


def test_a_dry_submission_prints_the_batch_file_and_the_config(open_door):
    job = ("--nodes", 2, "--gpus-per-node", 4, "--partition", "gpu", "--time", "1-0")
    code, out, _ = open_door("--cfg", "configs/vmamba_tiny.yaml", *job, "--dry-run", door="classification/submit.py")
    assert code == 0
    for part in ("--nodes=2", "--gpus-per-node=4", "--partition=gpu", "--time=1440", "NAME: vmamba_tiny"):
        assert part in out


def test_submitting_where_there_is_no_slurm_is_one_sentence(open_door, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = open_door("--cfg", "configs/vmamba_tiny.yaml", door="classification/submit.py")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "no srun" in err
