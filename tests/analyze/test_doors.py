"""The doors: their flags are the arguments of the one function each calls, and their errors are sentences."""

import argparse
import ast
import importlib
import inspect
import os
import runpy
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from vmamba.errors import UserError

ROOT = Path(__file__).parents[2]
OF_RUNS = ("ablate", "average", "compare", "curves")
GIVEN = {door: ["run"] for door in [*OF_RUNS, "one_file", "shrink"]}  # arguments without which it does not start
GIVEN["push"] = ["run", "me/name"]
DOORS = sorted(path.stem for path in (ROOT / "analyze").glob("[a-z]*.py"))


@pytest.fixture
def parser_of(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "analyze")  # as where a door is run
    monkeypatch.delitem(sys.modules, "_door", raising=False)
    return lambda door: runpy.run_path(str(ROOT / "analyze" / f"{door}.py"))["parser"]()


@pytest.mark.parametrize("door", DOORS)
def test_flags_are_the_functions_arguments_and_help_tells_their_defaults(door, parser_of):
    parser = parser_of(door)
    args = vars(parser.parse_args(GIVEN.get(door, [])))
    signature = inspect.signature(parser.function)
    assert list(signature.parameters) == list(signature.bind(**args).arguments)
    for name, parameter in signature.parameters.items():
        assert parameter.default in (args[name], inspect.Parameter.empty)
    assert "python analyze/" in parser.format_help()
    for action in parser._actions:
        switch = isinstance(action, (argparse._StoreTrueAction, argparse._HelpAction))
        assert (
            switch
            or action.dest in ("configs", "runs", "checkpoints", "checkpoint", "repo", "folder")
            or "(default:" in action.help
        ), action.dest


def test_a_default_is_shown_as_it_is_typed(parser_of):
    text = " ".join(parser_of("activation_map").format_help().split())
    assert "the query, shares of the sides (default: 0.5,0.3)" in text
    text = " ".join(parser_of("scale").format_help().split())
    assert "sides of the images (default: 224 448 672 896)" in text


NUMBERS = {"--size", "--sizes", "--num-images", "--repeats", "--warm-up", "--smooth", "--depth", "--batch-sizes"}
NUMBERS |= {"--target", "--channels", "--at", "--seeds", "--jobs"}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("value", ["-3", "1.5", "x", "1e400"])
def test_numbers_are_typed_and_bounded(door, value, parser_of, capsys):
    for flag in NUMBERS & set(parser_of(door).flags):
        with pytest.raises(SystemExit) as stop:
            parser_of(door).parse_args([flag, value, *GIVEN.get(door, [])])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.count("\n") == 1
        assert f"error: argument {flag}: '{value}' is no" in said


@pytest.mark.parametrize(
    ("door", "flags", "sentence"),
    [
        ("throughput", ["--repeats", "0"], "'0' is no whole number of at least 1"),
        ("throughput", ["--batch-sizes", "large"], "'large' is no whole number from 1 to 1048576, nor auto"),
        ("flops", ["--sizes", "32", "99999"], "'99999' is no whole number from 1 to 32768"),
        ("activation_map", ["--at", "0.5"], "'0.5' is no place"),
        ("activation_map", ["--at", "0.5,1.2"], "'0.5,1.2' is outside the image"),
        ("activation_map", ["--channels", "-1"], "'-1' is no whole number of at least 0, nor mean"),
        ("activation_map", ["a.jpg", "b.jpg"], "unexpected argument 'b.jpg'"),
        ("erf", ["--modles", "resnet18"], "unknown flag '--modles'; did you mean '--models'?"),
        ("erf", ["--model", "resnet18"], "unknown flag '--model'; did you mean '--models'?"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(door, flags, sentence, parser_of, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(door).parse_args(flags)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_words_among_numbers_stand_for_none(parser_of):
    assert parser_of("throughput").parse_args(["--batch-sizes", "1", "auto"]).batch_sizes == [1, None]
    assert parser_of("activation_map").parse_args(["--channels", "0", "7"]).channels == [0, 7]


@pytest.mark.parametrize("door", [door for door in DOORS if door != "push"])  # which writes elsewhere
def test_where_nothing_can_be_written_is_said_before_the_work(door, parser_of, monkeypatch, tmp_path):
    def work(*_, **__):
        raise AssertionError("it has begun")

    for name in ("zoo.create", "zoo.create_untrained", "complexity.create", "curves.read_run", "images.squares"):
        monkeypatch.setattr(f"vmamba.analysis.{name}", work)
    function = parser_of(door).function
    (tmp_path / "file").touch()
    given = [["run", "other"]] if door in OF_RUNS else GIVEN.get(door, [])
    file = "file/x" if door in ("average", "one_file", "summary") else "file"
    with pytest.raises(UserError, match="cannot write '.*file.*; free some space or choose another folder"):
        function(*given, output=str(tmp_path / file))
    if door in ("summary", "throughput"):
        flag = "output" if door == "summary" else "markdown"
        with pytest.raises(UserError, match=f"cannot write '{tmp_path}': it is a folder"):
            function(**{"output": str(tmp_path / "new"), flag: str(tmp_path)})


@pytest.mark.parametrize(("door", "flag"), [("activation_map", "image"), ("gradcam", "image"), ("erf", "images_from")])
def test_what_is_read_is_not_written_over(door, flag, parser_of, tmp_path):
    path = tmp_path / f"{door}.png"
    path.write_bytes(b"an image")
    with pytest.raises(UserError, match=f"{door}.png' would be written over '.*{door}.png', which is read here"):
        parser_of(door).function(**{flag: str(path if flag == "image" else tmp_path), "output": str(tmp_path)})
    assert path.read_bytes() == b"an image"


@pytest.fixture
def impostors(tmp_path):
    """A folder of files that are called what our packages are."""
    for name in ("vmamba", "vmamba_kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another package')\n")
    return tmp_path


def test_an_error_ends_the_process_with_one_sentence_whatever_else_has_our_name(impostors):
    command = [sys.executable, ROOT / "analyze/summary.py", "vmamba_tinny"]
    environment = os.environ | {"PYTHONPATH": str(impostors)}
    done = subprocess.run(command, cwd=impostors, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: unknown model 'vmamba_tinny'; did you mean 'vmamba_tiny'?\n"


@pytest.mark.parametrize("door", DOORS)
def test_every_door_first_puts_this_repository_in_front(door, impostors, monkeypatch):
    tree = ast.parse((ROOT / "analyze" / f"{door}.py").read_text())
    first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert isinstance(first, ast.ImportFrom) and first.module == "_door"
    path = [str(ROOT / "analyze"), str(impostors), *sys.path]  # as Python leaves it to a script
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.delitem(sys.modules, "_door", raising=False)
    importlib.import_module("_door")
    for name in ("vmamba", "vmamba_kernels"):
        assert Path(PathFinder.find_spec(name, sys.path).origin).is_relative_to(ROOT)
