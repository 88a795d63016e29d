"""The simulation of waiting against what can be told without one."""

import pytest

from vmamba.analysis.waiting import share_waited, waiting


def test_batches_that_take_all_the_same_time_keep_up_where_there_are_workers_enough():
    assert share_waited(8, 10, 10, spread=1e-9) == pytest.approx(0, abs=1e-6)
    assert share_waited(8, 5, 10, spread=1e-9) == pytest.approx(0.5, abs=0.01)
    assert share_waited(8, 20, 10, spread=0.3) == 0


def test_the_more_step_together_the_longer_they_wait():
    shares = [share_waited(n, 12, 10, slow=1e-3) for n in (1, 8, 64)]
    assert shares == sorted(shares) and shares[-1] > 0.3


def test_what_is_printed_is_what_is_written(tmp_path, capsys):
    rows = waiting(processes=[1, 2], workers=[10], steps=60, output=str(tmp_path))
    assert (
        rows[0].keys() == {"workers", "1 processes", "2 processes"}
        and rows[0]["1 processes"] in capsys.readouterr().out
    )
    assert (tmp_path / "waiting.json").exists()
