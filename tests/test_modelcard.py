"""modelcard.sh: a training and an evaluation command for every model."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vmamba.config import argument_parser, config_from_args
from vmamba.models.variants import VARIANTS

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("vmamba_*.yaml") if path.stem != "vmamba_digits")


def modelcard(*args: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the script asks Python
    return subprocess.run(
        [ROOT / "modelcard.sh", *args], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )


def test_it_lists_a_training_and_an_evaluation_of_every_config_and_the_published_numbers():
    lines = modelcard().stdout.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    parsed = [argument_parser().parse_args(command[command.index("main.py") + 1 :]) for command in commands]
    configs = [config_from_args(args) for args in parsed]
    assert sorted((config.MODEL.NAME, config.EVAL_MODE) for config in configs) == [
        (name, task) for name in NAMES for task in (False, True)
    ]
    assert all(bool(config.MODEL.PRETRAINED) is config.EVAL_MODE for config in configs)
    fetched = [line.split() for line in lines if line.startswith("curl")]
    assert [line[-1] for line in fetched] == [variant.weights for variant in VARIANTS.values() if variant.weights]
    evaluated = [config.MODEL.PRETRAINED for config in configs if config.EVAL_MODE]
    assert [line[-2] for line in fetched] == [path for path in evaluated if path.startswith("weights/")]
    numbers = [line for line in lines if line.startswith("#")]
    expected = [(name, variant.accuracy) for name, variant in VARIANTS.items() if variant.released_as]
    assert numbers == [
        f"# {name}: {f'{number}% top-1' if number else 'no published number'}" for name, number in expected
    ]


def test_a_dry_run_prints_one_command_with_its_further_arguments():
    line = modelcard("--dry-run", "vmamba_tiny_s1l8", "eval", "--batch-size", "64").stdout
    assert line.count("\n") == 1
    assert "--cfg configs/vmamba_tiny_s1l8.yaml" in line and "--eval" in line and line.endswith("--batch-size 64\n")


@pytest.mark.parametrize("args", [("vmamba_tny", "eval"), ("vmamba_tiny", "evl"), ("vmamba_tiny",)])
def test_a_mistake_is_one_sentence(args):
    result = modelcard("--dry-run", *args)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not result.stdout
