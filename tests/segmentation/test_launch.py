"""Two processes against one: every image counted once, what they save, weights that agree."""

import json
import re

from vmamba.config import output_folder
from vmamba.runtime.trainer import run

from ..forked import together
from .tiny import HELD_OUT, command, log, metrics, tiny_config

VARIED = ("MODEL.INIT_STD", 1.0)


def test_two_processes_train_and_count_as_one(tmp_path):
    """Batch norms of CPUs are of one process each, so it is the results of the same weights that are compared."""
    options = ("DATA.BATCH_SIZE", 2, *VARIED)
    together(29637, *command(tmp_path, "--opts", *options)[1:])
    config = tiny_config(tmp_path, *options)
    assert "2 processes on CPU" in log(config) and len(metrics(config)) == 2
    one = run(tiny_config(tmp_path, *options, "EVAL_MODE", True))
    alone = json.loads((output_folder(config) / "evaluation.json").read_text())
    assert one == {name: metrics(config)[-1][name] for name in one}
    evaluate = ("--eval", "--save-predictions", "--opts", *options)
    out = together(29638, *command(tmp_path, *evaluate, door="segmentation/main.py")[1:])
    both = json.loads((output_folder(config) / "evaluation.json").read_text())
    for told in (both, alone):
        told.pop("by")  # which process, and when
    assert both == alone  # each class's too
    assert f"mIoU {one['mIoU']:.2f}%" in re.search("last.pth: (.*)", out).group(1)
    assert len([*(output_folder(config) / "predictions").rglob("*.png")]) == HELD_OUT
