"""What marked tests need; without it they are skipped and say why."""

import signal

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def as_without_nohup():
    """Under nohup a process ignores SIGHUP, and a run leaves it so."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
