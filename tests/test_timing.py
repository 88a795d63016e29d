"""The time that work takes."""

import time

import pytest
import torch

from vmamba.timing import elapsed


def test_work_is_done_once_and_measured_in_seconds():
    done = []
    seconds = elapsed(lambda: done.append(time.sleep(0.05)), torch.device("cpu"))
    assert done == [None]
    assert 0.05 <= seconds < 5


@pytest.mark.gpu
def test_what_is_queued_on_a_gpu_is_waited_for():
    x = torch.randn(8192, 8192, device="cuda")
    x @ x
    seconds = elapsed(lambda: [x @ x for _ in range(10)], x.device)
    assert seconds > 10 * 2 * 8192**3 / 1e15  # no GPU does 10^15 operations a second in float32
