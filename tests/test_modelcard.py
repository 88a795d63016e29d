"""modelcard.sh: a training and an evaluation command for every model."""

import shlex
import subprocess
from pathlib import Path

import pytest

from vmamba.config import argument_parser, config_from_args

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("vmamba_*.yaml") if path.stem != "vmamba_digits")


def modelcard(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "modelcard.sh", *args], capture_output=True, text=True)


def test_it_lists_a_training_and_an_evaluation_of_every_config():
    commands = [shlex.split(line) for line in modelcard().stdout.splitlines() if line.startswith("torchrun")]
    parsed = [argument_parser().parse_args(command[command.index("main.py") + 1 :]) for command in commands]
    configs = [config_from_args(args) for args in parsed]
    assert sorted((config.MODEL.NAME, config.EVAL_MODE) for config in configs) == [
        (name, task) for name in NAMES for task in (False, True)
    ]
    assert all(bool(config.MODEL.PRETRAINED) is config.EVAL_MODE for config in configs)


def test_a_dry_run_prints_one_command_with_its_further_arguments():
    line = modelcard("--dry-run", "vmamba_tiny_s1l8", "eval", "--batch-size", "64").stdout
    assert line.count("\n") == 1
    assert "--cfg configs/vmamba_tiny_s1l8.yaml" in line and "--eval" in line and line.endswith("--batch-size 64\n")


@pytest.mark.parametrize("args", [("vmamba_tny", "eval"), ("vmamba_tiny", "evl"), ("vmamba_tiny",)])
def test_a_mistake_is_one_sentence(args):
    result = modelcard("--dry-run", *args)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not result.stdout
