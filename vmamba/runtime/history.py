"""run.json: each start of a run, by what and where, and how it ended; the code's changes beside it."""

import json
import logging
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from vmamba.files import read_text, write_text
from vmamba.runtime.distributed import World, gather, on_main
from vmamba.text import counted

logger = logging.getLogger("vmamba")
LARGEST_DIFF = 10**7  # characters that are kept
_PACKAGES = ("vmamba", "torch", "torchvision", "timm", "triton", "numpy")
_REPOSITORY = Path(__file__).resolve().parents[2]


class History:
    """The starts in `folder`'s run.json; of the processes that have no folder nothing is written.

    A start whose end is null goes on, or its process was killed.  What cannot be written is a warning and no end of the
    run, and a file that is none of ours stays as it is.
    """

    def __init__(self, folder: Path | None):
        self.path = folder and folder / "run.json"
        self.starts: list[dict[str, Any]] | None = None
        self.facts: dict[str, Any] = {}  # of this start, also where nothing is written

    def begin(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        if self.path is None:
            return
        try:
            starts = json.loads(read_text(self.path))["starts"] if self.path.exists() else []
            diff = self._write_diff(len(starts) + 1) if facts["changed"] else None
            self.starts = [*starts, {**facts, "diff": diff, "ended": None, "end": None}]
            self._write()
        except Exception as error:
            self.starts = None
            logger.warning(f"cannot record '{self.path}': {error}; the run goes on")

    def end(self, cause: str) -> None:
        if self.starts is None or self.starts[-1]["end"] is not None:
            return
        self.starts[-1] |= {"ended": _now(), "end": cause}
        try:
            self._write()
        except Exception as error:
            logger.warning(f"cannot record '{self.path}': {error}")

    def _write_diff(self, number: int) -> str | None:
        """What files of the repository have otherwise than the commit, beside run.json; its name."""
        diff = _git("diff", "HEAD")
        if not diff or len(diff) > LARGEST_DIFF:
            return None
        name = f"changes.{number}.diff"
        write_text(self.path.with_name(name), f"{diff}\n")
        return name

    def _write(self) -> None:
        write_text(self.path, json.dumps({"starts": self.starts}, indent=1) + "\n")


def facts(config: CfgNode, world: World) -> dict[str, Any]:
    """By what, where, with which code and seed; all processes call it."""
    device = world.device
    threads = counted(torch.get_num_threads(), "thread")
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads}"
    places = gather((socket.gethostname(), here))
    commit, changed = on_main(lambda: (_git("rev-parse", "HEAD"), _git("status", "--porcelain")))
    return {
        "command": shlex.join(sys.argv),
        "started": _now(),
        "seed": config.SEED,
        "hosts": list(dict.fromkeys(host for host, _ in places)),
        "devices": [device for _, device in places],  # of each process
        "commit": commit,  # of the code, where it lies in a repository
        "changed": None if changed is None else bool(changed),  # files differ from it
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version(name) if _installed(name) else None for name in _PACKAGES},
    }


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _installed(name: str) -> bool:
    try:
        version(name)
        return True
    except PackageNotFoundError:
        return False


def _git(*arguments: str) -> str | None:
    if not (_REPOSITORY / ".git").exists():
        return None
    command = ("git", "-C", str(_REPOSITORY), *arguments)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
