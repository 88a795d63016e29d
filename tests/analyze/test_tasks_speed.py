"""Timing detectors and segmenters side by side: who is timed, what is written.  No time itself is tested."""

import json

import pytest
import torch

from vmamba.analysis.tasks_speed import tasks_speed
from vmamba.errors import UserError

SETTINGS = dict(size=(64, 32), batch=2, dtype="float32", warm_up=1, repeats=1, device="cpu")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_every_backbone_is_timed_in_every_mode(task, tmp_path):
    rows = tasks_speed(task=task, backbones=["vmamba_nano"], random_sizes=2, output=str(tmp_path), **SETTINGS)
    assert [row.get("mode") for row in rows] == ["forward", "train", None]
    assert rows[0]["ratio"] == 1 and rows[2]["steps of random sizes"] == 2
    assert json.loads((tmp_path / f"{task}.json").read_text())["rows"] == rows
    assert "images of 64 x 32" in (tmp_path / f"{task}.md").read_text()


def test_an_unknown_task_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="unknown task 'detecting'; did you mean 'detection'"):
        tasks_speed(task="detecting", output=str(tmp_path))


def test_cuda_graphs_need_a_gpu_and_deterministic_algorithms_end_with_the_run(tmp_path):
    with pytest.raises(UserError, match="--compile cudagraphs needs a GPU, and this runs on cpu; leave it out"):
        tasks_speed(compile="cudagraphs", device="cpu", output=str(tmp_path))
    with pytest.raises(UserError, match="unknown model 'nothing'"):
        tasks_speed(backbones=["nothing"], deterministic=True, device="cpu", output=str(tmp_path))
    assert not torch.are_deterministic_algorithms_enabled()
