"""Streams that break, other people's modules, systems without what Unix has: none of them ends a run."""

import os
import subprocess
import sys

from vmamba.config import output_folder
from vmamba.runtime.trainer import run

from .tiny import ALONE, ROOT, command, log, metrics, saved, tiny_config


def test_a_reader_that_leaves_an_ascii_terminal_and_a_module_called_vmamba(tmp_path):
    (tmp_path / "vmamba.py").write_text("raise ImportError('not this one')")
    output = tmp_path / "oä"
    output.mkdir()
    environment = {**ALONE["env"], "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(tmp_path)}
    arguments = command(output, "--opts", "TRAIN.EPOCHS", "1", door="classification/main.py")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, **ALONE | {"env": environment}) as process:
        assert "main.py --cfg" in process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
    assert process.returncode == 0
    config = tiny_config(output)
    run(config)
    assert f"resumed {output_folder(config) / 'last.pth'}" in log(config)
    assert len(metrics(config)) == 2


def test_without_what_only_unix_has(tmp_path):
    """As on Windows: modules that are not there, signals that have no name."""
    config = tiny_config(tmp_path)
    program = f"""
import signal, sys, types
for name in ("fcntl", "resource", "termios", "pwd", "grp", "syslog"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "pthread_sigmask", "sigwaitinfo"):
    delattr(signal, name)
import torch, vmamba
assert vmamba.create_model("vmamba_digits", num_classes=3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
from vmamba.config import get_config
from vmamba.runtime.trainer import run
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, LK_NBLCK=2, locking=lambda *args: None)  # Windows's own
run(get_config({str(tmp_path / "tiny.yaml")!r}, ["OUTPUT", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, **ALONE)
    assert done.returncode == 0, done.stderr
    assert saved(config)["step"] == 6 and os.path.samefile(ROOT, ALONE["cwd"])
