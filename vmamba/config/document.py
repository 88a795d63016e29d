"""docs/config.md, made from the keys' lines: python -m vmamba.config.document > docs/config.md"""

from collections.abc import Iterable, Mapping

import yaml

from vmamba.config.keys import COMMON, TASKS, Key, keys_of
from vmamba.models.options import CONFIGURABLE
from vmamba.values import Takes

_HEAD = """# Configuration

Every key of a config file, set there, by `--opts KEY VALUE ...`, or by its flag. A file starts with `BASE: other.yaml`
to build on another one. This page is made from the keys themselves (`python -m vmamba.config.document`).
"""


def document() -> str:
    """The page: the keys that every task has, those of each task, the options of the models."""
    parts = [_HEAD, "## Every task\n", _table(COMMON)]
    for task in TASKS:
        own = [key for key in keys_of(task).values() if key not in COMMON]
        parts += [f"## {task.capitalize()}\n", _table(own)]
    parts += ["## MODEL.OPTIONS\n\nOf our models; what is not set is as the variant in MODEL.NAME has it.\n"]
    rows = [(name, option.default, option.meaning, option.takes, None) for name, option in CONFIGURABLE.items()]
    return "\n".join([*parts, _rows(rows)])


def _table(keys: Iterable[Key]) -> str:
    return _rows((key.name, key.default, key.meaning, key.takes, key.flag) for key in keys)


def _rows(rows: Iterable[tuple[str, object, str, Takes, str | None]]) -> str:
    lines = ["| key | default | meaning | takes | flag |", "|---|---|---|---|---|"]
    for name, default, meaning, takes, flag in rows:
        cells = [f"`{name}`", f"`{_yaml(default)}`", meaning, str(takes), f"`--{flag}`" if flag else ""]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


if __name__ == "__main__":
    print(document(), end="")
