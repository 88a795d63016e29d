"""The doors: their flags are the arguments of the one function each calls, and their errors are sentences."""

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOORS = {  # door -> the arguments it cannot do without
    "activation_map": [],
    "curves": ["run"],
    "erf": [],
    "gradcam": [],
    "scale": [],
    "summary": [],
    "throughput": [],
}


@pytest.mark.parametrize("door", DOORS)
def test_flags_are_the_functions_arguments(door):
    names = runpy.run_path(str(ROOT / "analyze" / f"{door}.py"))
    args = names["parser"]().parse_args(DOORS[door])
    inspect.signature(names[door]).bind(**vars(args))
    assert "python analyze/" in names["parser"]().format_help()


@pytest.mark.parametrize(
    ("door", "flags", "sentence"),
    [
        ("throughput", ["--repeats", "0"], "'0' is no whole number of at least 1"),
        ("activation_map", ["--at", "0.5"], "'0.5' is no place"),
        ("erf", ["--modles", "resnet18"], "unrecognized arguments: --modles"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(door, flags, sentence, capsys):
    names = runpy.run_path(str(ROOT / "analyze" / f"{door}.py"))
    with pytest.raises(SystemExit) as stop:
        names["parser"]().parse_args(flags)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_an_error_ends_the_process_with_one_sentence():
    command = [sys.executable, "analyze/summary.py", "vmamba_tinny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: unknown model 'vmamba_tinny'; did you mean 'vmamba_tiny'?\n"
