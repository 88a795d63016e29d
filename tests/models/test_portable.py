"""Models without what POSIX alone has: import, inference, training and files, in a process that has none of it."""

import subprocess
import sys

PROGRAM = """
import builtins, os, sys
real = builtins.__import__

def without(name, *rest, **named):
    if name.partition(".")[0] in ("fcntl", "resource", "pwd", "grp", "termios"):
        if sys._getframe(1).f_globals.get("__name__", "").startswith("vmamba"):
            raise ModuleNotFoundError(f"No module named '{name}'")
    return real(name, *rest, **named)

builtins.__import__ = without
import torch, vmamba
from vmamba import files
from vmamba.models.pretrained import load_pretrained

assert files.fcntl is None
model = vmamba.create_model("vmamba_digits", num_classes=3)
model(torch.randn(2, 3, 16, 16)).sum().backward()
torch.save({"model": model.state_dict()}, sys.argv[1])
other = vmamba.create_model("vmamba_digits", num_classes=3)
load_pretrained(other, vmamba.load_checkpoint(sys.argv[1]))
x = torch.randn(1, 3, 32, 32)
assert torch.equal(other.eval()(x), model.eval()(x))
"""


def test_models_need_no_module_of_posix(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "weights.pth"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
