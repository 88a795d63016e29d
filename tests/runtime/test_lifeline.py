"""A process that ends is heard of by the others, with its reason; what is no end of another stays what it is."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.runtime import lifeline, trainer
from vmamba.runtime.lifeline import Lifeline, PeerLost
from vmamba.runtime.stop import Stopped

GLOO = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:31638"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(lifeline, "SECONDS_TO_HEAR", 2.0)
    monkeypatch.setattr(lifeline, "SECONDS_OF_ITS_OWN", 0.1)
    monkeypatch.setattr(lifeline, "SECONDS_TO_END", 0.5)
    monkeypatch.setattr(lifeline, "SECONDS_TO_CLOSE", 5.0)


@pytest.fixture
def processes():
    """processes(act, ...): a process for each function `act(lifeline, tell)`; what each told, and how it ended."""
    children = []

    def start(*acts):
        pipes = [os.pipe() for _ in acts]
        shared = [os.pipe() for _ in acts]
        for rank, act in enumerate(acts):
            child = os.fork()
            if not child:
                try:
                    line = Lifeline(rank, len(acts), timeout=10)
                    line.connect(lambda value, rank=rank: share(value, rank, shared))
                    act(line, lambda text, rank=rank: os.write(pipes[rank][1], text.encode()))
                finally:
                    os._exit(7)
            children.append(child)
        for _, write in [*pipes, *shared]:
            os.close(write)
        told = []
        for read, _ in pipes:
            with open(read) as pipe:
                told.append(pipe.read())
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        children.clear()
        for read, _ in shared:
            os.close(read)
        return told, ends

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)


def share(value, rank, pipes):
    if rank == 0:
        for _, write in pipes:
            os.write(write, json.dumps(value).encode())
        return value
    return json.loads(os.read(pipes[rank][0], 1000))


def in_a_collective(line, tell):
    """Waits as NCCL would; the end of the process is the lifeline's work."""
    line.on_loss = lambda error: tell(str(error))
    time.sleep(60)


def breaks(line, tell):
    """As gloo, whose collective fails when a process is gone."""
    line.on_loss = lambda error: tell("written; ")
    try:
        with line.explaining():
            time.sleep(0.3)
            raise RuntimeError(GLOO)
    except PeerLost as error:
        tell(f"{error.loss.said}|{error.loss.story}")
    os._exit(1)


def killed(line, tell):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_with_children(line, tell):
    """Its loading processes live on for a while, with copies of all that it had open."""
    if not os.fork():
        time.sleep(3)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_killed_process_ends_all_others_whatever_they_wait_for(processes, place):
    start = time.time()
    acts = [in_a_collective] * 3
    acts[place] = killed
    told, ends = processes(*acts)
    assert ends == [-9 if rank == place else 1 for rank in range(3)]
    for rank in {0, 1, 2} - {place}:
        assert told[rank].startswith(f"process {place} on ") and "has ended without a word: it was killed" in told[rank]
    assert time.time() - start < 10


def test_children_of_a_killed_process_do_not_keep_it_alive(processes):
    start = time.time()

    def told_when(line, tell):
        line.on_loss = lambda error: tell(f"{time.time() - start:.2f}")
        time.sleep(60)

    told, _ = processes(told_when, killed_with_children)
    assert float(told[0]) < 2.5


def test_what_a_process_says_at_its_end_is_what_the_others_show(processes):
    told, ends = processes(breaks, breaks, lambda line, tell: line.fail("ValueError: no such thing", "Traceback ..."))
    assert told[:2] == ["written; ValueError: no such thing|Traceback ..."] * 2
    assert ends == [1, 1, 7]


def test_a_process_that_ends_as_all_do_is_no_loss(processes):
    def leaves_later(line, tell):
        time.sleep(1)
        tell(str(line.loss))
        line.leave()

    def leaves(line, tell):
        line.leave()

    assert processes(leaves, leaves, leaves_later) == (["", "", "None"], [7, 7, 7])


def test_an_end_of_its_own_is_shown_as_what_it_is(processes):
    """The same mistake on two processes: none is the other's."""

    def fails(line, tell):
        line.on_loss = lambda error: tell("the other's")
        line.fail("a mistake")
        time.sleep(1)
        tell("its own")

    assert processes(fails, fails)[0] == ["its own", "its own"]


def test_an_error_of_no_other_process_stays_what_it_is(monkeypatch):
    monkeypatch.setattr(lifeline, "SECONDS_TO_HEAR", 0.1)  # nothing will come
    alone, together = Lifeline(), Lifeline(0, 2, timeout=7)
    for line, error in [
        (alone, RuntimeError(GLOO)),
        (together, RuntimeError("NCCL error: invalid usage")),
        (together, RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")),
        (together, ZeroDivisionError("gloo")),
    ]:
        with pytest.raises(type(error)) as shown, line.explaining():
            raise error
        assert shown.value is error
    with pytest.raises(UserError, match=r"process 0 waited 7 s \(TIMEOUT\) for the others"), together.explaining():
        raise RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 7000ms for recv operation to complete")


def test_a_stranger_is_not_taken_for_a_process_of_the_run():
    first, second, shared = Lifeline(0, 2, timeout=10), Lifeline(1, 2, timeout=10), []

    def strangers_first(value):
        for said in (b'["guess", 1, "host"]\n', b"GET / HTTP/1.1\r\n\r\n", b"7\n", b"[" * 9999 + b"\n"):
            with socket.create_connection(("127.0.0.1", value[0])) as stranger:
                stranger.sendall(said)
        shared.append(value)

    joining = threading.Thread(target=first.connect, args=(strangers_first,))
    joining.start()
    while not shared:
        time.sleep(0.01)
    second.connect(lambda value: shared[0])
    joining.join(10)
    assert [rank for rank, _ in first._lines.values()] == [1]
    first.leave(), second.leave()


def test_a_run_that_was_asked_to_stop_as_the_other_was_ends_as_stopped(tmp_path, monkeypatch):
    """The other process was not yet where a signal is only noted, and is gone; a scheduler goes by the exit code."""

    def loses_the_other(run, folder):
        with run.request.noting():
            signal.raise_signal(signal.SIGUSR2)
            raise PeerLost(lifeline.Loss(1, "host", "stopped by SIGUSR2"))

    monkeypatch.setattr(trainer, "_run", loses_the_other)
    with pytest.raises(Stopped, match="SIGUSR2"):
        trainer.run(get_config(None, ["OUTPUT", str(tmp_path), "NAME", "run", "DEVICE", "cpu"]))
