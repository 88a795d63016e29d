"""The program `vmamba`, installed or as python -m vmamba: each command is the door of the repository."""

import subprocess
import sys

import pytest

import vmamba
from tests.classification.tiny import ALONE, command
from vmamba import commands


def program(*arguments):
    line = [sys.executable, "-m", "vmamba", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, **ALONE)


@pytest.fixture
def called(monkeypatch, capsys):
    """called(arguments) -> (exit code, stdout, stderr), in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vmamba", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


def test_a_training_from_anywhere(tmp_path):
    line = command(tmp_path)[2:]  # the arguments of main.py
    ran = program("train", *line, "--epochs", "1")
    assert ran.returncode == 0 and "3 steps trained" in ran.stdout
    assert " -m vmamba" not in ran.stderr


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_each_command_has_its_help(name, called):
    code, out, _ = called(name, "--help")
    assert code == 0 and out.startswith(f"usage: vmamba {name}")


def test_the_list_and_a_slip(called):
    code, out, _ = called()
    assert code == 0 and all(f"  {name}" in out for name in commands.COMMANDS)
    assert called("--help")[1] == out
    assert called("--version")[:2] == (0, f"vmamba {vmamba.__version__}\n")
    assert called("trian")[0] == "vmamba: error: unknown command 'trian'; did you mean 'train'?"
    code, _, err = called("train", "--cfg", "x.yaml", "--nothing")
    assert code == 2 and err.startswith("vmamba train: error: unknown flag '--nothing'")
    code, _, err = called("average", "one.pth")
    assert code == 1 and "an average needs two checkpoints at least" in err
