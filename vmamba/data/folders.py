"""Folders of images: what is in them, what is passed over and told, and what cannot be looked into."""

import os
import stat
from collections import Counter
from pathlib import Path

from yacs.config import CfgNode

from vmamba.data.images import suffixes
from vmamba.errors import UserError
from vmamba.files import cannot_read
from vmamba.text import printable, some

# What systems put beside images: thumbnails, forks of files, bins.
_SYSTEMS = {
    "__MACOSX",
    "@eaDir",
    "@Recycle",
    "@Recently-Snapshot",
    "@sharebin",
    "@tmp",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "Network Trash Folder",
    "Temporary Items",
    "TheFindByContentFolder",
    "TheVolumeSettingsFolder",
    "lost+found",
    "__pycache__",
}


class LeftOut:
    """What was passed over in folders, by its kind: a suffix, or words."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, path: str) -> None:
        self.counts[kind] += 1
        self.examples.setdefault(kind, path)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Such as "12 .heic ('a/1.heic', ...), 1 hidden image ('a/._1.png')"."""
        return ", ".join(
            f"{count:,} {kind} ('{printable(self.examples[kind])}'{', ...' if count > 1 else ''})"
            for kind, count in self.counts.most_common()
        )


def what_is(path: str | Path) -> str | None:
    """What lies there: "folder", "file" (or a device), or None.

    Raises UserError where the system does not let us look.
    """
    found = _status(path)
    return None if found is None else "folder" if stat.S_ISDIR(found.st_mode) else "file"


def file_at(path: str | Path) -> tuple[int, int] | None:
    """Which file lies there, the same one for all links to it; None where there is none.

    Raises UserError as `what_is`.
    """
    found = _status(path)
    return None if found is None or stat.S_ISDIR(found.st_mode) else (found.st_dev, found.st_ino)


def _status(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # Python's ValueError is of a zero byte in the name
        return None
    except OSError as error:
        raise cannot_read(path, error) from error


def listing(folder: str | Path, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """The names of (folders, files) in `folder`, sorted, links followed; of links that lead nowhere among the files.

    Systems' folders are passed over.  Hidden ones are added to `left_out`, and so is what would keep its reader
    waiting: pipes, devices, sockets.
    Raises UserError where it, or what a link in it leads to, cannot be looked into.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)):
                    files.append(entry.name)
                elif not entry.is_dir():
                    left_out.add("pipe or device", entry.path)
                elif entry.name.startswith("."):
                    left_out.add("hidden folder", entry.path)
                elif entry.name not in _SYSTEMS:
                    folders.append(entry.name)
    except OSError as error:
        raise cannot_read(error.filename or folder, error) from error
    return sorted(folders), sorted(files)


def contents(folder: str | Path) -> str:
    """In words, for the end of a sentence.  Raises UserError where it cannot be looked into."""
    try:
        return f"it holds {some(sorted(os.listdir(folder)))}"
    except OSError as error:
        raise cannot_read(folder, error) from error


def data_path(config: CfgNode) -> Path:
    """DATA.DATA_PATH.  Raises UserError where it is not a folder."""
    path, name = Path(config.DATA.DATA_PATH), config.DATA.DATASET
    if not config.DATA.DATA_PATH:
        raise UserError(f"DATA.DATASET '{name}' is read from a folder; name it with --data-path")
    found = what_is(path)
    if found != "folder":
        what = "does not exist" if found is None else "is not a folder"
        raise UserError(f"data path '{printable(path)}' {what}; name the folder of {name} with --data-path")
    return path


def image_files(folder: str | Path, left_out: LeftOut | None = None, channels: int = 3) -> list[str]:
    """The paths of the images in `folder` and the folders below it: folder by folder, by name in each.

    What has a suffix that `decode` reads, of so many `channels`, is one.  Links are followed, but not to a folder they
    lie in, which would never end; what is above a class holds the other classes and the other split.  What is not
    taken is added to `left_out`: files of other suffixes, what is hidden, such links.
    Raises UserError where a folder cannot be looked into.
    """
    left_out = LeftOut() if left_out is None else left_out
    found: dict[str, list[str]] = {}
    _walk(str(folder), _above(folder), suffixes(channels), found, left_out)
    return [path for place in sorted(found) for path in found[place]]


def _walk(folder: str, above: set, known: set[str], found: dict[str, list[str]], left_out: LeftOut) -> None:
    identity = _identity(folder)
    if identity in above:
        left_out.add("linked to a folder it lies in", folder)
        return
    folders, files = listing(folder, left_out)
    found[folder] = []
    for name in files:
        path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
        if suffix not in known:
            if not name.startswith("."):
                left_out.add(suffix or "without a suffix", path)
        elif name.startswith("."):
            left_out.add("hidden image", path)
        else:
            found[folder].append(path)
    for name in folders:
        path = os.path.join(folder, name)
        lies_in = above | {identity} | (_above(path) if os.path.islink(path) else set())
        _walk(path, lies_in, known, found, left_out)


def _above(folder: str | Path) -> set[tuple[int, int]]:
    """The folders that `folder` lies in: those of its path as it is written, and those of where links lead."""
    parts = Path(folder).absolute().parts
    start = max((place for place, part in enumerate(parts, 1) if part == ".."), default=1)
    written = Path(os.path.realpath(Path(*parts[:start])), *parts[start:])  # what is behind the last ..
    return {_identity(parent) for path in (written, Path(os.path.realpath(folder))) for parent in path.parents}


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise cannot_read(folder, error) from error
    return found.st_dev, found.st_ino
