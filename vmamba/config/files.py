"""YAML files with inheritance, and text of the command line: the only place that reads YAML."""

import ast
import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from vmamba.errors import UserError
from vmamba.files import read_text

Setting = tuple[str, Any, str]  # key, value, where it stands; a value may be a section of keys as a dict
_ROOT = Path(__file__).resolve().parents[2]  # the repository, where configs/ lies
_MOST = 1_000_000  # values of a file
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def find(path: Path) -> Path:
    """`path`, in the working directory or in the repository.  Raises UserError, naming the nearest file."""
    for candidate in (path, _ROOT / path):
        if candidate.is_file():
            return candidate
    files = {}
    for folder in (_ROOT / "configs", path.parent):  # of one name the one where it was looked for
        files |= {file.stem: file for file in folder.glob("[!.]*.y*ml")}
    nearest = get_close_matches(path.stem, files, n=1, cutoff=0.6)
    near = files[nearest[0]] if nearest else None
    if near and near.is_relative_to(_ROOT) and not path.is_absolute():
        near = near.relative_to(_ROOT)  # where `find` looks too
    hint = f"did you mean '{near}'?" if near else "give an existing YAML file with --cfg"
    raise UserError(f"config file '{path}' does not exist; {hint}")


def settings(path: Path, chain: tuple[Path, ...] = ()) -> Iterator[Setting]:
    """Those of the files `path` builds on, then its own, whole sections.  `chain`: the files that led here."""
    if path.resolve() in chain:
        raise UserError(f"config file '{chain[-1]}' builds on '{path.resolve()}', which builds on it; break the cycle")
    tree = _read(path)
    bases = tree.pop("BASE", [])
    if not isinstance(bases, (str, list)) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: BASE is {bases!r}; expected a string or a list of strings")
    for base in filter(None, [bases] if isinstance(bases, str) else bases):  # released files have an empty one
        file = path.parent / base
        if not file.is_file():
            raise UserError(f"{path}: its BASE '{base}' does not exist; the path is relative to that file")
        for key, value, source in settings(file, (*chain, path.resolve())):
            if key != "NAME":  # a run's name is its own
                yield key, value, source
    for key, value in tree.items():
        yield str(key), value, str(path)


def from_text(text: str, kinds: tuple) -> Any:
    """What `text` of the command line means where one of `kinds` is expected."""
    if str in kinds and int not in kinds and not any(isinstance(kind, list) for kind in kinds):
        return text
    if kinds == (bool,):
        return _BOOLEANS.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: deeply nested
        try:
            return _parse(text)
        except yaml.YAMLError:
            return text


class _Loader(yaml.SafeLoader):
    """YAML as people read it: 1:30 is no number of minutes, 010 no octal number, 2026-01-02 no date, and a key that
    stands twice, of which YAML would drop the first, is refused."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{name}' stands twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(([0-9][0-9_]*)\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?|\.(inf|nan))$", re.I),
    list("-+0123456789."),
)


def _parse(text: str) -> Any:
    """Raises yaml.YAMLError, also for what only Python cannot hold."""
    try:
        tree = yaml.load(text, _Loader)
        if _size(tree, {}) > _MOST:
            raise yaml.YAMLError(f"by its aliases it stands for more than {_MOST:,} values")
        return tree
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except ValueError as error:  # of a number with thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _size(value: Any, known: dict[int, float]) -> float:
    """How many values `value` stands for, which by a few aliases of aliases may be more than fit into memory."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # where it holds itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]


def _read(path: Path) -> dict:
    try:
        tree = _parse(read_text(path))
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}, line {error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"cannot read config file '{path}': {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"config file '{path}' holds {tree!r:.60}; expected sections of keys such as TRAIN")
    return tree or {}
