"""Programs in processes of their own that are forked from one which has imported everything: a start takes no seconds.

Each has its arguments, environment, folder, session and exit status, as by its command line.  What it has not is a
fresh interpreter: every door and every launcher has a test elsewhere that starts it with one.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "vmamba.runtime.__main__",
        "vmamba.classification.task",
        "vmamba.detection.task",
        "vmamba.segmentation.task",
    ]
)


def start_server() -> None:
    """The process that others are forked from, where it does not run yet; with one thread, as they have."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


class Program:
    """The process of a Python file with its arguments, to be used as one of `subprocess.Popen`."""

    def __init__(self, *arguments: object, cwd: Path = ROOT, **environment: object):
        start_server()
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        changes = {name: str(value) for name, value in environment.items()}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | changes
        given = [*map(str, arguments)], cwd, environment, self._outputs, multiprocessing.get_start_method()
        self._process = context.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it wrote until its end."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            raise AssertionError(f"the process did not end in {timeout} s")
        return tuple(path.read_text() for path in self._outputs)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        if self.poll() is None and error[0]:
            self._process.kill()
        self._process.join()


def start(port: int, *arguments: object, **environment: object) -> list[Program]:
    """Both processes of a run of two, as each is started by torchrun."""
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment
    return [Program(*arguments, RANK=rank, LOCAL_RANK=rank, **world) for rank in range(2)]


def together(port: int, *arguments: object) -> str:
    """What the first process of such a run wrote; both must succeed."""
    started = start(port, *arguments)
    (out, *_), *_ = outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert not any("Grad strides" in errors for _, errors in outputs)  # such gradients DistributedDataParallel copies
    return out


def _run(arguments: list[str], cwd: Path, environment: dict[str, str], outputs: list[Path], method: str) -> None:
    multiprocessing.set_start_method(method, force=True)  # as it is for others, which this process was not started by
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [str(Path(arguments[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = arguments
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
