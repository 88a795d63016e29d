"""What a wheel holds, and that the repository says the same in its few places of record."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vmamba
from vmamba.models.variants import VARIANTS

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "vmamba", "kernels"):
        (source / name).symlink_to(REPOSITORY / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield {name: archive.read(name).decode() for name in archive.namelist()}


def test_wheel_holds_every_source_and_nothing_else(wheel):
    def sources(folder):
        return {
            path.relative_to(folder.parent).as_posix()
            for path in folder.rglob("*")
            if path.suffix in (".py", ".cu", ".cuh") or path.name == "py.typed"
        }

    expected = sources(REPOSITORY / "vmamba") | sources(REPOSITORY / "kernels" / "vmamba_kernels")
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_wheel_names_what_it_needs_and_its_licence(wheel):
    metadata = next(text for name, text in wheel.items() if name.endswith("/METADATA"))
    assert "License-Expression: MIT" in metadata
    needs = re.findall(r"^Requires-Dist: ([\w.-]+)", metadata, re.MULTILINE)
    assert {"torch", "torchvision", "timm", "yacs"} <= set(needs)
    compiled = re.findall(r"^Requires-Dist: (?:mamba-ssm|causal-conv1d)(.*)", metadata, re.MULTILINE)
    assert compiled == ['; extra == "mamba"'] * 2  # which nothing asks for


def test_every_command_of_the_readme_exists():
    readme = (REPOSITORY / "README.md").read_text()
    files = set(re.findall(r"(?:python|torchrun\s.*?|--cfg|launch)\s+([\w/]+\.(?:py|yaml))", readme))
    assert "main.py" in files and "configs/vmamba_tiny.yaml" in files
    assert [name for name in files if not (REPOSITORY / name).exists()] == []
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\s*make (\w+)", readme, re.MULTILINE)) <= targets


def test_the_readmes_table_says_what_the_registry_says():
    readme = (REPOSITORY / "README.md").read_text()
    for name, variant in VARIANTS.items():
        if variant.parameters is None:
            continue
        accuracy = variant.accuracy or "–"
        weights = f"[{variant.weights.rpartition('/')[2]}]({variant.weights})" if variant.weights else "–"
        row = (
            f"| `{name}` | {variant.released_as} | {accuracy} | {variant.parameters / 1e6:.1f}M | "
            f"{variant.gflops:.2f}G | [yaml](configs/{name}.yaml) | {weights} |"
        )
        assert row in readme
        assert (REPOSITORY / "configs" / f"{name}.yaml").is_file()


def test_every_name_of_the_face_is_there():
    assert all(getattr(vmamba, name) is not None for name in vmamba.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'create_modell'"):
        vmamba.create_modell  # noqa: B018
    stated = re.search(r'^version = "(.*)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert vmamba.__version__ == stated
