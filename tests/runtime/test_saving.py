"""States written in the background: as they were when asked for, in order, and under as many names as are kept."""

import os
import threading

import pytest
import torch

from vmamba import files
from vmamba.errors import UserError
from vmamba.runtime import saving
from vmamba.runtime.checkpoint import newest_checkpoint, read_checkpoint
from vmamba.runtime.saving import Copies, Saver

NAMES = ("best.pth", "last.pth")


class State:
    """What a saver asks of a state: the `step`-th, found to be worth `headline`."""

    def __init__(self, step, headline=None, improved=False, **more):
        self.step, self.headline, self.unimproved = step, headline, 0 if improved else 1
        self.more = more

    def state_dict(self):
        return {
            "steps_per_epoch": 10,
            "step": self.step,
            "recorded": self.step,
            "headline": self.headline,
            "best": {},
            **self.more,
        }


@pytest.fixture
def gate(monkeypatch):
    """Writing begins when it is opened."""
    opened, write = threading.Event(), saving.save_checkpoint

    def waiting(*args):
        assert opened.wait(10)
        write(*args)

    monkeypatch.setattr(saving, "save_checkpoint", waiting)
    return opened


def steps(folder):
    return {path.name: read_checkpoint(path)["step"] for path in sorted(folder.glob("*.pth"))}


def save(saver, state, *names):
    saver.start(state, names)
    saver.wait()


def test_what_is_written_is_the_state_as_it_was(tiny, same, tmp_path, gate):
    case, saver = tiny("TRAIN.EMA.ENABLE", "True"), Saver(tmp_path)
    case.train(3)
    case.state.gather_random_states()
    torch.save(case.state.state_dict(), tmp_path / "then.pth")
    saver.start(case.state, ["last.pth"])
    case.train(2)
    case.state.best["acc1"] = 99.0
    gate.set()
    saver.wait()
    assert same(read_checkpoint(tmp_path / "last.pth"), read_checkpoint(tmp_path / "then.pth"))


def test_one_is_written_at_a_time(tmp_path, gate):
    saver = Saver(tmp_path)
    saver.start(State(1), ["last.pth"])
    second = threading.Thread(target=saver.start, args=(State(2), ["best.pth"]))
    second.start()
    second.join(0.2)
    assert second.is_alive() and os.listdir(tmp_path) == []
    gate.set()
    second.join()
    saver.wait()
    assert steps(tmp_path) == {"last.pth": 1, "best.pth": 2}


def test_a_write_that_fails_is_logged_at_once_and_told_at_the_next_chance(tmp_path, monkeypatch):
    saver, said = Saver(tmp_path / "run"), []
    monkeypatch.setattr(saving.logger, "error", said.append)
    saver.start(State(1), ["last.pth"])  # there is no such folder
    saver.close()
    assert len(said) == 1 and said[0].startswith("cannot write '") and said[0].endswith("where it would save next")
    with pytest.raises(UserError, match="cannot write"):
        saver.start(State(2), ["last.pth"])
    (tmp_path / "run").mkdir()
    save(saver, State(3), "last.pth")
    assert steps(tmp_path / "run") == {"last.pth": 3}


def test_the_last_are_kept_and_one_step_counts_once(tmp_path):
    saver = Saver(tmp_path, keep_last=3)
    for step in (1, 2, 3, 3, 4, 4):
        save(saver, State(step), "last.pth")
    assert steps(tmp_path) == {"last.pth": 4, "last.2.pth": 3, "last.3.pth": 2}


def test_the_best_of_several_evaluations_are_kept_in_their_order(tmp_path):
    saver = Saver(tmp_path, keep_best=3)
    for step, (value, improved) in enumerate([(5, 1), (7, 1), (6, 0), (1, 0), (7, 0), (9, 1)], start=1):
        save(saver, State(step, value, improved), "best.pth")
    assert steps(tmp_path) == {"best.pth": 6, "best.2.pth": 2, "best.3.pth": 5}
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "best.pth"


@pytest.mark.parametrize("links", [True, False])
def test_a_state_of_two_names_is_two_files_also_where_there_are_no_links(tmp_path, monkeypatch, links):
    def none(*paths):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(files.os, "link", none)
    saver = Saver(tmp_path, keep_last=2)
    save(saver, State(1, 5, True), *NAMES)
    save(saver, State(2, 6, True), *NAMES)
    assert steps(tmp_path) == {"last.pth": 2, "best.pth": 2, "last.2.pth": 1}
    assert {path.stat().st_nlink for path in tmp_path.glob("*.pth")} == {1}
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_damaged_file_does_not_take_the_place_of_the_good_one_before(tmp_path):
    saver = Saver(tmp_path, keep_last=2)
    save(saver, State(1), "last.pth")
    save(saver, State(2, weight=torch.ones(1000)), "last.pth")
    with (tmp_path / "last.pth").open("r+b") as file:  # a bit flips, of which torch.load takes no notice
        content = bytearray(file.read())
        content[content.index(torch.ones(1).numpy().tobytes() * 8)] ^= 1
        file.seek(0)
        file.write(content)
    path, passed_over = newest_checkpoint(tmp_path)
    assert path == tmp_path / "last.2.pth" and "is truncated or damaged" in passed_over[tmp_path / "last.pth"]
    save(Saver(tmp_path, keep_last=2), State(3), "last.pth")  # of a run that resumed from there
    assert steps(tmp_path) == {"last.pth": 3, "last.2.pth": 1}


def test_a_copy_shares_nothing_and_keeps_what_a_state_dict_has(tiny, same):
    state = tiny().state.state_dict()
    copied, event = Copies().of(state)
    assert event is None and same(copied, state)
    assert copied["model"]._metadata == state["model"]._metadata
    pairs = zip(copied["model"].values(), state["model"].values(), strict=True)
    assert not {one.data_ptr() for one, _ in pairs} & {other.data_ptr() for other in state["model"].values()}


@pytest.mark.gpu
def test_on_a_gpu_no_update_gets_into_a_copy_and_the_memory_is_used_again():
    weight, copies = torch.zeros(2**24, device="cuda"), Copies()
    tied = {"one": weight, "other": weight}
    memory = None
    for number in range(3):
        copied, event = copies.of(tied)
        for _ in range(50):
            weight += 1
        event.synchronize()
        assert copied["one"].is_pinned() and copied["one"].data_ptr() == copied["other"].data_ptr()
        assert copied["one"].unique().tolist() == [50 * number]
        assert memory in (None, copied["one"].data_ptr())
        memory = copied["one"].data_ptr()
