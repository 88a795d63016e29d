"""A machine that leaves a run of torchrun and comes back: python tests/elastic.py

Two agents on this host, as on two machines.  One is killed with its process and started again; the run must go on from
its checkpoint and end with the weights of an undisturbed one.  Takes a minute or two, most of it PyTorch's waiting.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.classification.tiny import ALONE, command, differences, log, metrics, saved, tiny_config  # noqa: E402
from vmamba.config import output_folder  # noqa: E402


def main(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import time\nfrom vmamba.runtime.step import OptimizerStep as Step\nstep = Step.__call__\n"
        "Step.__call__ = lambda *args, **options: time.sleep(0.1) or step(*args, **options)\n"
    )
    flags = ("--batch-size", "4", "--epochs", "8", "--opts", "TRAIN.SAVE_STEPS", "1", "AUG.MIXUP", "0")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts"]
    agent += ["3", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:29641", "--rdzv_id", "elastic"]
    env = {**ALONE["env"], "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/parallel.md
    alone = {**ALONE, "env": env, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
    run_of = [*agent, *command(folder, "--tag", "elastic", "--import", "slow", *flags)[1:]]
    config = tiny_config(folder, "TAG", "elastic")
    written = output_folder(config) / "log.txt"
    first = subprocess.Popen(run_of, **alone)
    while socket.socket().connect_ex(("127.0.0.1", 29641)):  # the first is where they meet
        assert first.poll() is None
        time.sleep(0.1)
    second = subprocess.Popen(run_of, **alone)
    try:
        while not (written.exists() and "train [3/8]" in written.read_text()):
            assert first.poll() is None and second.poll() is None
            time.sleep(0.05)
        for child in Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        second.kill()
        while "has ended without a word" not in written.read_text():
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.Popen(run_of, **alone)
        errors = [process.communicate(timeout=120)[1] for process in (first, second)]
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [first.returncode, second.returncode] == [0, 0], errors
    assert log(config).count("resumed ") == 1
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29642"]
    subprocess.run(
        [*two, *command(folder, "--tag", "whole", *flags)[1:]], check=True, stdout=subprocess.DEVNULL, **ALONE
    )
    whole = tiny_config(folder, "TAG", "whole")
    assert metrics(config) == metrics(whole)
    assert not differences(saved(config)["model"], saved(whole)["model"])
    print("the weights of an undisturbed run")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
