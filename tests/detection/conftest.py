"""One thread, models counted once and curves undrawn, as in classification's tests."""

from ..classification.conftest import counted_once, curves_undrawn, one_thread  # noqa: F401  (fixtures of all here)
