"""One config out of defaults, files and settings, each key and value checked by its line in `keys`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from vmamba.config.files import Setting, find, from_text, settings
from vmamba.config.keys import TASKS, Key, keys_of
from vmamba.errors import UserError, unknown
from vmamba.extensions import import_modules
from vmamba.files import write_atomically
from vmamba.models.options import CONFIGURABLE, check_configured
from vmamba.models.released_yaml import from_released_config

_WHOLE = ("OUTPUT", "TAG", "DEVICE", "DATA", "MODEL", "TRAIN", "AMP")  # which only the whole config of a run has all
OPTIONS = "MODEL.OPTIONS"  # a section that takes the options of the model


def get_config(cfg_file: str | Path | None = None, opts: Sequence[Any] = ()) -> CfgNode:
    """The frozen config of a file (None: the defaults) with `opts` = [key, value, ...] set on top; its IMPORT is done.

    A relative path is looked for in the working directory, then in the repository.
    Raises UserError for a missing file, an unknown key, a value that does not fit.
    """
    return merge(cfg_file, pairs(opts))


def pairs(opts: Sequence[Any]) -> list[Setting]:
    """The settings of --opts.  Raises UserError for a key without a value."""
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY VALUE, but '{opts[-1]}' stands alone")
    return [(key, value, "--opts") for key, value in zip(opts[::2], opts[1::2], strict=True)]


def merge(cfg_file: str | Path | None, more: Sequence[Setting]) -> CfgNode:
    """The frozen config of a file with `more` settings on top, whose values may be text of the command line."""
    path = cfg_file and find(Path(cfg_file))
    in_file = list(settings(path)) if path else []
    schema = Schema(_task([*in_file, *more]))
    config = schema.defaults()
    for key, value, source in from_released_config(schema.flat(in_file)):
        schema.set(config, key, value, source)
    if path:
        config.NAME = config.NAME or path.stem
    schema.add(config, more)
    config.NAME = config.NAME or config.MODEL.NAME
    import_modules(config.IMPORT)
    config.freeze()
    return config


def changed(config: CfgNode, opts: Sequence[Any]) -> CfgNode:
    """A frozen copy with `opts` = [key, value, ...] set on top.  Raises UserError as `get_config`."""
    copy = config.clone()
    copy.defrost()
    Schema(config.TASK).add(copy, pairs(opts))
    import_modules(copy.IMPORT)
    copy.freeze()
    return copy


def restored(saved: Mapping[str, Any], source: str = "the checkpoint's config") -> CfgNode:
    """The frozen config of a checkpoint, given as plain values, of this version or an earlier one: a key that it lacks
    has its default, and one that there is no more is left out.

    Raises UserError, naming `source`, for an unknown TASK and for what a key does not take.
    """
    given = [(name, value, source) for name, value in saved.items()]
    schema = Schema(_task(given))
    config = schema.defaults()
    for key, value, source in schema.flat(given):
        if key in schema.keys or key.rpartition(".")[0] == OPTIONS:
            schema.set(config, key, value, source)
    config.freeze()
    return config


def save_config(config: CfgNode, path: str | Path) -> None:
    """Write the whole config as YAML; `get_config(path)` gives the same one back.

    Raises UserError where the file there was not written so.
    """
    if Path(path).exists() and not {*_WHOLE} <= {key for key, *_ in settings(Path(path))}:
        raise UserError(f"'{path}' is no run's config and would be overwritten; move it away, or choose another --tag")
    write_atomically(path, lambda file: file.write(config.dump().encode()))


def output_folder(config: CfgNode) -> Path:
    """The run's folder, OUTPUT/NAME/TAG."""
    return Path(config.OUTPUT, config.NAME, config.TAG)


def image_size(config: CfgNode) -> tuple[int, int]:
    """DATA.IMG_SIZE as (height, width)."""
    return sides(config.DATA.IMG_SIZE)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """A key's side in pixels, or [height, width], as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _task(given: Sequence[Setting]) -> str:
    """TASK as the last setting of it says."""
    task, source = "classification", ""
    for key, value, where in given:
        if key == "TASK":
            task, source = value, where
    if task not in list(TASKS):  # of a file's TASK, which may be of any kind
        raise UserError(f"{source}: {unknown('TASK', str(task), TASKS)}")
    return task


class Schema:
    """The keys of a task's configs."""

    def __init__(self, task: str):
        self.keys: dict[str, Key] = keys_of(task)
        self.keys["TASK"] = replace(self.keys["TASK"], default=task)
        self.sections = {key.rpartition(".")[0] for key in self.keys} - {""}
        self.sections |= {section.partition(".")[0] for section in self.sections} | {OPTIONS}

    def defaults(self) -> CfgNode:
        config = CfgNode()
        for section in sorted(self.sections):  # a section comes before those inside it
            self._node(config, section.rpartition(".")[0])[section.rpartition(".")[2]] = CfgNode(
                new_allowed=section == OPTIONS
            )
        for key in self.keys.values():
            section, _, name = key.name.rpartition(".")
            self._node(config, section)[name] = list(key.default) if isinstance(key.default, list) else key.default
        return config

    def kinds(self, key: str) -> tuple:
        """What `key` takes; nothing for an unknown one, which `set` refuses."""
        section, _, name = key.rpartition(".")
        found = CONFIGURABLE.get(name) if section == OPTIONS else self.keys.get(key)
        return found.takes.kinds if found else ()

    def flat(self, given: Sequence[Setting], prefix: str = "") -> list[Setting]:
        """`given` with its sections taken apart.  Raises UserError where a section is no mapping."""
        found = []
        for name, value, source in given:
            key = f"{prefix}{name}"
            if key not in self.sections:
                found.append((key, value, source))
            elif isinstance(value, Mapping):
                inside = [(str(each), item, source) for each, item in value.items()]
                found += self.flat(inside, f"{key}.")
            elif value is not None:
                raise UserError(f"{source}: {key} is {value!r}; expected a section of keys")
        return found

    def add(self, config: CfgNode, more: Sequence[Setting]) -> None:
        """Set `more` keys, whose values may be text of the command line.  Raises UserError as `set`."""
        for key, value, source in more:
            if key == "BASE":
                raise UserError(f"{source}: BASE works in a config file only; name another file with --cfg")
            self.set(config, key, from_text(value, self.kinds(key)) if isinstance(value, str) else value, source)

    def set(self, config: CfgNode, key: str, value: Any, source: str) -> None:
        """Set one key.  Raises UserError, naming `source`, for an unknown key and for what the key does not take."""
        section, _, name = key.rpartition(".")
        if section != OPTIONS and key not in self.keys:
            raise UserError(f"{source}: {self._unknown(key)}")
        try:
            checked = check_configured(name, value) if section == OPTIONS else self.keys[key].check(value)
            self._node(config, section)[name] = checked
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def _node(self, config: CfgNode, section: str) -> CfgNode:
        for name in filter(None, section.split(".")):
            config = config[name]
        return config

    def _unknown(self, key: str) -> str:
        """The sentence for a key there is not: the nearest right one by name, or by what people call it."""
        if key in self.sections:
            return f"{key} is a section; set one of its keys"
        section, _, last = key.upper().rpartition(".")
        names = [*self.keys, *self.sections]
        called = {word.upper(): each.name for each in self.keys.values() for word in each.also.split()}
        alike = [called[word] for word in (key.upper(), last) if word in called]
        alike = alike or [f"{OPTIONS}.{name}" for name in CONFIGURABLE if name.upper() == last]
        alike = alike or get_close_matches(key.upper(), names, n=1, cutoff=0.8)
        if not alike:
            ends = {name.rpartition(".")[2] for name in names}
            end = get_close_matches(last, ends, n=1, cutoff=0.8)
            same_end = [name for name in names if [name.rpartition(".")[2]] == end]
            alike = get_close_matches(key.upper(), same_end, n=1, cutoff=0.0)
        alike = alike or [called[word] for word in get_close_matches(last, called, n=1, cutoff=0.7)]
        if section not in self.sections:  # else the section is not what is wrong
            alike = alike or get_close_matches(section, self.sections, n=1, cutoff=0.8)
        hint = f"did you mean '{alike[0]}'?" if alike else "docs/config.md lists them all"
        return f"unknown config key '{key}'; {hint}"


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every key of a config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
