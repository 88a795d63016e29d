"""modelcard.sh: a training and an evaluation command for every model."""

import contextlib
import io
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmamba.config import argument_parser, config_from_args, get_config
from vmamba.models.published import PUBLISHED
from vmamba.runtime.task import open_task

ROOT = Path(__file__).parents[1]


def modelcard(*args: str, place: Path = ROOT) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the script asks Python
    return subprocess.run(
        [place / "modelcard.sh", *args], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A folder with the script, and for Python what prints the table at once: the import of torch takes seconds."""
    place, table = tmp_path_factory.mktemp("modelcard"), io.StringIO()
    with contextlib.redirect_stdout(table):
        runpy.run_path(str(ROOT / "vmamba/models/published.py"), run_name="__main__")
    (place / "table").write_text(table.getvalue())
    python = place / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$*" = "-m vmamba.models.published" ] && cat table\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "modelcard.sh", place)
    return place


def test_it_lists_a_training_and_an_evaluation_of_every_row_and_the_published_numbers():
    lines = modelcard().stdout.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    parsed = [argument_parser().parse_args(command[command.index("main.py") + 1 :]) for command in commands]
    configs = [config_from_args(args) for args in parsed]
    assert [(args.cfg, config.EVAL_MODE) for args, config in zip(parsed, configs, strict=True)] == [
        (f"configs/{row.config}.yaml", evaluates) for row in PUBLISHED for evaluates in (False, True)
    ]
    assert all(config.MODEL.PRETRAINED for config in configs if config.EVAL_MODE)
    assert {config.TASK for config in configs if config.MODEL.PRETRAINED and not config.EVAL_MODE} == {
        *("detection", "segmentation")
    }
    fetched = [line.split() for line in lines if line.startswith("curl")]
    assert [line[-1] for line in fetched] == [row.weights for row in PUBLISHED if row.weights]
    assert len({line[-2] for line in fetched}) == len(fetched)
    evaluated = [config.MODEL.PRETRAINED for config in configs if config.EVAL_MODE]
    assert [line[-2] for line in fetched] == [path for path in evaluated if path.startswith("weights/")]
    numbers = [line for line in lines if line.startswith("#")]
    assert "# VMamba-T[s1l8]: 82.6% top-1" in numbers
    assert "# mamba2 tiny, not trained by its authors: no published number" in numbers
    assert "# UperNet, VMamba-T[s1l8]: 47.9% mIoU, 48.8% mIoU at several scales" in numbers


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.config)
def test_a_row_is_the_model_of_its_config(row):
    config = get_config(ROOT / "configs" / f"{row.config}.yaml")
    assert row.table == config.TASK
    with torch.device("meta"):
        model = open_task(config).build_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e6 == pytest.approx(row.parameters, abs=1.0)
    header = (ROOT / "configs" / f"{row.config}.yaml").read_text()
    assert all(f"{number:g}" in header for number in row.numbers.values())


def test_a_dry_run_prints_one_command_with_its_further_arguments(quick):
    line = modelcard("--dry-run", "vmamba_tiny_s1l8", "eval", "--batch-size", "64", place=quick).stdout
    assert line.count("\n") == 1
    assert "--cfg configs/vmamba_tiny_s1l8.yaml" in line and "--eval" in line and line.endswith("--batch-size 64\n")


@pytest.mark.parametrize("args", [("vmamba_tny", "eval"), ("vmamba_tiny", "evl"), ("vmamba_tiny",)])
def test_a_mistake_is_one_sentence(quick, args):
    result = modelcard("--dry-run", *args, place=quick)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not result.stdout
