"""One thread, here as in the processes that the tests start: the order of float sums depends on their number."""

import pytest
import torch

from vmamba.runtime.records import Records


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """A picture of them takes half a second; the runs that a module's tests share draw one."""
    monkeypatch.setattr(Records, "draw", lambda self: None)
