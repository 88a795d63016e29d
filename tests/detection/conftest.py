"""One thread, as in classification's tests."""

from ..classification.conftest import one_thread  # noqa: F401  (a fixture of every module here)
