"""`make figures`: what it makes, from what, and that the documents name its commands beside the pictures."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = sorted(
    path.stem for path in (ROOT / "docs/figures").glob("*.png") if path.stem != "digit"
)  # shown to models
RUNS = ("vmamba_digits", "scenes_detection", "scenes_segmentation")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

# Stands in for Python: writes down the command, and a picture that holds it into the folder named by --output.
PYTHON = """#!/bin/sh
echo "$*" >> commands
[ "$1" = -m ] && exit
for output; do :; done
case $1 in
    main.py) name=$(basename "$3" .yaml) && mkdir -p $output && mkdir $output/$name $output/$name/default ;;
    "$FAILS") exit 1 ;;
    *) mkdir -p $output && echo "$*" > $output/picture.png ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """The Makefile beside documents, a stale run and foreign pictures."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs/figures", tmp_path / "docs/figures")
    for name in ("figures/erf", "figures/foreign", "figures/vmamba_digits/default", "vmamba_digits/default"):
        (tmp_path / "output" / name).mkdir(parents=True)
        (tmp_path / "output" / name / "old.png").write_text("stale or foreign")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    return tmp_path


def make_figures(checkout, fails=""):
    command = ["make", "figures", "RUN=./python"]
    return subprocess.run(command, cwd=checkout, env=ENVIRONMENT | {"FAILS": fails}, capture_output=True, text=True)


def test_the_pictures_are_made_in_order_from_a_fresh_folder(checkout):
    assert make_figures(checkout).returncode == 0
    install, *rest = (checkout / "commands").read_text().splitlines()
    trained, drawn = rest[: len(RUNS)], rest[len(RUNS) :]
    assert install.startswith("-m pip install")
    assert trained == [f"main.py --cfg configs/{name}.yaml --output output/figures" for name in RUNS]
    assert len(drawn) == len(PICTURES)
    for command in drawn:
        assert not re.search(r"output/(?!figures/)", command)  # nothing of other runs
    pictures = {path.stem: path.read_bytes() for path in (checkout / "docs/figures").glob("*.png")}
    before = (ROOT / "docs/figures/digit.png").read_bytes()
    assert pictures.pop("digit") == before
    assert sorted(pictures) == PICTURES
    for name, content in pictures.items():
        assert content.decode().strip().endswith(f"--output output/figures/{name}")


def test_where_one_cannot_be_made_none_is_replaced(checkout):
    assert make_figures(checkout, fails="analyze/gradcam.py").returncode != 0
    for name in PICTURES:
        assert (checkout / f"docs/figures/{name}.png").read_bytes() == (ROOT / f"docs/figures/{name}.png").read_bytes()


def commands_of_the_makefile() -> dict[str, str]:
    """Picture -> its command as a reader would type it, with the runs of `make train` and the other tasks'."""
    dry = subprocess.run(["make", "-n", "figures"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    commands = {}
    for line in dry.stdout.replace("\\\n", " ").splitlines():
        if found := re.search(r"(analyze/.*) --output output/figures/(\w+)$", " ".join(line.split())):
            commands[found[2]] = re.sub(f"output/figures/({'|'.join(RUNS)})", r"output/\1", found[1])
    return commands


@pytest.mark.parametrize("document", ["README.md", "docs/pictures.md"])
def test_the_command_beside_a_picture_is_the_one_that_made_it(document):
    expected = commands_of_the_makefile()
    assert sorted(expected) == PICTURES
    text = (ROOT / document).read_text()
    shown = {}  # picture -> what stands behind it, up to the next picture or section
    for name, behind in re.findall(r"!\[[^]]*\]\((?:docs/)?figures/(\w+)\.png\)(.*?)(?=\n!\[|\n## |\Z)", text, re.S):
        shown[name] = [" ".join(command.split()) for command in re.findall(r"`python (analyze/[^`]*)`", behind)]
    assert sorted(shown) == PICTURES
    for name, commands in shown.items():
        if name != "curves" or document != "README.md":  # there the curves are those of `make train`
            assert commands[:1] == [expected[name]]
