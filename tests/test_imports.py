"""The rooms of the house in their order: each imports only the ones before it, and no folder shadows a package.

`python tests/test_imports.py` prints which room imports which.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [  # rooms in one line are neighbours and do not know each other
    ["vmamba_kernels"],
    ["vmamba.errors", "vmamba.text"],
    ["vmamba.extensions", "vmamba.files", "vmamba.signals", "vmamba.timing", "vmamba.values"],
    ["vmamba.data"],
    ["vmamba.models"],
    ["vmamba.config"],
    ["vmamba.runtime"],
    ["vmamba.classification", "vmamba.detection", "vmamba.segmentation"],
    ["vmamba.analysis"],
    ["vmamba.exporting"],
    ["vmamba.commands"],
    ["vmamba.__main__"],
]
DOORS = ("main.py", "kernels", "classification", "detection", "segmentation", "analyze")


def room_of(module: str) -> str | None:
    """The room of an import name: None for other people's packages, "vmamba" for the package's own __init__."""
    for name in (room for level in ROOMS for room in level):
        if module == name or module.startswith(name + "."):
            return name
    return "vmamba" if module.partition(".")[0] == "vmamba" else None


def imported_modules(source: str, package: str) -> set[str]:
    """Every module that `source`, a file of `package`, imports anywhere, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            modules |= {f"{module}.{alias.name}" for alias in node.names} if module == "vmamba" else {module}
    return modules


def may_import(room: str, other: str) -> bool:
    """Whether a file in `room` may import one in `other`."""
    level = {name: number for number, names in enumerate(ROOMS) for name in names}
    if room == "vmamba":  # the package's face shows the models, those of detection and segmentation too, and `export`
        return (
            other in ("vmamba.detection", "vmamba.segmentation", "vmamba.exporting")
            or level.get(other, 99) <= level["vmamba.models"]
        )
    return room == other or level.get(other, 99) < level[room]


def library_files() -> list[tuple[str, Path]]:
    """(import name, file) of everything that can be imported."""
    found = []
    for parent in (ROOT, ROOT / "kernels"):
        for path in sorted([*parent.glob("vmamba/**/*.py"), *parent.glob("vmamba_kernels/**/*.py")]):
            found.append((".".join(path.relative_to(parent).with_suffix("").parts).removesuffix(".__init__"), path))
    return found


@pytest.mark.parametrize(("name", "path"), library_files(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_imports_only_rooms_above_its_own(name, path):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    modules = imported_modules(path.read_text(), package)
    rooms = {module: room_of(module) for module in modules}
    assert not [module for module, room in rooms.items() if room and not may_import(room_of(name), room)]


def test_no_library_file_imports_a_door():
    doors = {path.stem for folder in DOORS for path in (ROOT / folder).glob("*.py")} | {
        "main",
        "classification",
        "kernels",
    }
    for name, path in library_files():
        modules = imported_modules(path.read_text(), name.rpartition(".")[0])
        assert not {module.partition(".")[0] for module in modules} & doors, path


def test_no_folder_at_the_root_shadows_a_package():
    assert not [folder for folder in DOORS if (ROOT / folder / "__init__.py").exists()]


@pytest.mark.parametrize(
    ("room", "statement", "allowed"),
    [
        ("vmamba.runtime.state", "from vmamba.errors import UserError", True),
        ("vmamba.runtime.state", "def f():\n    import vmamba.classification.task", False),
        ("vmamba.models.ss2d", "from vmamba import config", False),
        ("vmamba.models.ss2d", "from ..runtime import state", False),
        ("vmamba.models.ss2d", "from .layers import Mlp", True),
        ("vmamba_kernels.registry", "from vmamba.errors import UserError", False),
        ("vmamba.detection.engine", "from vmamba.classification import data", False),
    ],
)
def test_the_rule_itself(room, statement, allowed):
    modules = imported_modules(statement, room.rpartition(".")[0])
    assert all(may_import(room_of(room), room_of(module)) for module in modules) == allowed


def graph() -> str:
    """A line a room, in the order of the rooms: its files, and the rooms that they import."""
    imports = {room: set() for level in ROOMS for room in level}
    files = dict.fromkeys(imports, 0)
    for name, path in library_files():
        room = room_of(name)
        if room in imports:
            files[room] += 1
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            imports[room] |= {room_of(module) for module in imported_modules(path.read_text(), package)}
    lines = []
    for room, used in imports.items():
        others = [other for other in imports if other in used and other != room]
        if files[room]:
            lines.append(f"{room} ({files[room]} files) imports {', '.join(others) or 'none'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(graph())
