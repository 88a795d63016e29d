"""One thread, as in classification's tests, and no picture of the curves."""

import pytest

from vmamba.runtime.records import Records

from ..classification.conftest import one_thread  # noqa: F401  (a fixture of every module here)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """A picture of them takes half a second; the runs that a module's tests share draw one."""
    monkeypatch.setattr(Records, "draw", lambda self: None)
