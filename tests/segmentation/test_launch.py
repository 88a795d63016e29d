"""Two processes against one: every image counted once, what they save, weights that agree."""

import json
import re
import subprocess
import sys

from vmamba.config import output_folder
from vmamba.runtime.trainer import run

from .tiny import ALONE, HELD_OUT, command, log, metrics, tiny_config

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29637")
VARIED = ("MODEL.INIT_STD", 1.0)


def launch(folder, *arguments, door="main.py"):
    done = subprocess.run(
        [*LAUNCHER, *command(folder, *map(str, arguments), door=door)[1:]],
        capture_output=True,
        timeout=300,
        **ALONE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_and_count_as_one(tmp_path):
    """Batch norms of CPUs are of one process each, so it is the results of the same weights that are compared."""
    options = ("DATA.BATCH_SIZE", 2, *VARIED)
    launch(tmp_path, "--opts", *options)
    config = tiny_config(tmp_path, *options)
    assert "2 processes on CPU" in log(config) and len(metrics(config)) == 2
    one = run(tiny_config(tmp_path, *options, "EVAL_MODE", True))
    alone = json.loads((output_folder(config) / "evaluation.json").read_text())
    assert one == {name: metrics(config)[-1][name] for name in one}
    out = launch(tmp_path, "--eval", "--save-predictions", "--opts", *options, door="segmentation/main.py")
    both = json.loads((output_folder(config) / "evaluation.json").read_text())
    for told in (both, alone):
        told.pop("by")  # which process, and when
    assert both == alone  # each class's too
    assert f"mIoU {one['mIoU']:.2f}%" in re.search("last.pth: (.*)", out).group(1)
    assert len([*(output_folder(config) / "predictions").rglob("*.png")]) == HELD_OUT
