"""Stopping and ending: signals are noted, errors are sentences, exit codes say what happened."""

import signal

import pytest

from vmamba.errors import UserError
from vmamba.runtime.cli import exit_code
from vmamba.runtime.stop import Stopped, StopRequest
from vmamba.signals import STOP_SIGNALS as SIGNALS
from vmamba_kernels import BackendError


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_noted_and_the_old_handlers_come_back(signum):
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as request:
        with pytest.raises(Stopped, match=f"{signal.Signals(signum).name}; nothing was trained"):
            signal.raise_signal(signum)
        assert not request.noted
    with StopRequest() as request, request.noting():
        assert request.signum is None
        signal.raise_signal(signum)
        assert request.signum == signum
        assert request.agreed_signal() == signum
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("error", [UserError("no such thing; try another"), BackendError("no such thing; try another")])
def test_what_the_user_can_mend_is_one_sentence(error, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert exit_code(raising(error)) == 1
    assert capsys.readouterr().err == "error: no such thing; try another\n"


def test_another_rank_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert exit_code(raising(UserError("no"))) == 1
    assert capsys.readouterr().err == "[rank 3] error: no\n"


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with StopRequest() as request:
        signal.raise_signal(signal.SIGHUP)
        assert not request.noted
    signal.signal(signal.SIGHUP, before)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)


def test_exit_codes(tmp_path, capsys):
    assert exit_code(lambda: None) == 0
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert exit_code(raising(Stopped(signal.SIGTERM, tmp_path / "last.pth"))) == 143
    said = capsys.readouterr().err
    assert "SIGTERM" in said and "interrupted; the same command begins anew\n" in said
    assert exit_code(raising(KeyboardInterrupt()), resumes=True) == 130
    assert "interrupted; the same command goes on from what is saved" in capsys.readouterr().err
