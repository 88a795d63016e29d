"""One thread, here as in the processes that the tests start: the order of float sums depends on their number.  And what
takes more than half of a tiny run's time without a test's looking at it, once or not at all."""

from importlib import import_module

import pytest
import torch

from vmamba.runtime import records

COUNTED = {}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def counted_once(request):
    """The multiply-adds that a run tells of, a quarter to a half of its time, are counted once for models alike."""
    task = import_module(f"vmamba.{request.path.parent.name}.task")
    count = task.complexity

    def remembered(model, size):
        alike = repr(model), *(parameter.shape for parameter in model.parameters()), size
        if alike not in COUNTED:
            COUNTED[alike] = count(model, size)
        return COUNTED[alike]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "complexity", remembered)
        yield


@pytest.fixture(autouse=True)
def curves_undrawn():
    """A picture of them takes half a second; the runs that a module's tests share draw one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "draw_curves", lambda metrics, path, panels: path.touch())
        yield
