"""Checkpoints: wholly written or not at all, and read with one sentence for everything that is not one."""

import os
import pickle
import resource

import pytest
import torch

from vmamba.errors import UserError
from vmamba.runtime.checkpoint import newest_checkpoint, read_checkpoint, read_training_state, save_checkpoint

State = dict  # of a run, or of part of one


@pytest.fixture
def full_disk():
    """Files cannot grow past 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, full_disk):
    path = tmp_path / "last.pth"
    save_checkpoint(State(step=1), path)
    with pytest.raises(UserError, match=r"last\.pth.*too large; free some space or choose another folder"):
        save_checkpoint(State(step=2, model={"weight": torch.zeros(2**16)}), path)
    assert read_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pth"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(State(step=1), tmp_path / "file" / "last.pth")


def test_an_error_that_is_not_the_disks_keeps_its_name_and_leaves_no_file(tmp_path):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(State(step=lambda: None), tmp_path / "last.pth")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path, share):
    path = tmp_path / "last.pth"
    save_checkpoint(State(model={"weight": torch.zeros(1000)}), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"last\.pth'"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint '.*nowhere\.pth'"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_pickled_code_is_refused_and_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"model": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth' holds pickled objects"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "attacked").exists()


def test_only_the_state_of_a_run_resumes(tmp_path):
    save_checkpoint(State(model={}, steps_per_epoch=3), tmp_path / "last.pth")
    assert read_training_state(tmp_path / "last.pth")["steps_per_epoch"] == 3
    save_checkpoint(State(model={"weight": torch.zeros(1)}, optimizer={}, epoch=3), tmp_path / "released.pth")
    assert read_training_state(tmp_path / "released.pth") is None


def state_at(step, recorded=0):
    return State(steps_per_epoch=10, step=step, recorded=recorded, epoch=recorded // 10)


def test_the_furthest_is_found_whatever_the_files_were_touched(tmp_path):
    states = {"last.pth": state_at(30, 20), "best.pth": state_at(30, 30), "step_10.pth": state_at(10, 10)}
    for age, (name, state) in enumerate(states.items()):
        save_checkpoint(state, tmp_path / name)
        os.utime(tmp_path / name, ns=(10**9 * (9 + age),) * 2)
    (tmp_path / ".last.pth.tmp").write_bytes(b"what a killed process left")
    assert newest_checkpoint(tmp_path) == (tmp_path / "best.pth", {})  # of the same step, but evaluated
    save_checkpoint(state_at(30, 30), tmp_path / "last.pth")
    os.utime(tmp_path / "last.pth", ns=(1, 1))
    assert newest_checkpoint(tmp_path) == (tmp_path / "last.pth", {})
    os.truncate(tmp_path / "last.pth", 100)
    path, skipped = newest_checkpoint(tmp_path)
    assert path == tmp_path / "best.pth"
    assert list(skipped) == [tmp_path / "last.pth"]


@pytest.mark.parametrize("odd", [{"steps_per_epoch": None}, {"step": "abc"}, {"recorded": 1.5}, {"epoch": []}])
def test_what_others_put_there_is_passed_over_and_never_overwritten(tmp_path, odd):
    save_checkpoint(State(weight=torch.zeros(3)), tmp_path / "exported_ema.pth")
    save_checkpoint(state_at(70), tmp_path / "another_runs_last.pth")
    (tmp_path / "notes.pth").write_text("no checkpoint at all")
    assert newest_checkpoint(tmp_path) == (None, {})
    save_checkpoint(State(**{"steps_per_epoch": 10, "step": 1, "epoch": 0} | odd), tmp_path / "last.pth")
    with pytest.raises(UserError, match=r"last\.pth' is not the state of a run and would be overwritten; move it away"):
        newest_checkpoint(tmp_path)
    save_checkpoint(state_at(3), tmp_path / "last.pth")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "last.pth"
    save_checkpoint(State(weight=torch.zeros(3)), tmp_path / "best.pth")
    with pytest.raises(UserError, match=r"best\.pth' is not the state of a run and would be overwritten; move it away"):
        newest_checkpoint(tmp_path)


def test_a_state_of_the_first_version_tells_how_far_it_is(tmp_path):
    save_checkpoint(State(steps_per_epoch=10, step=20, epoch=1), tmp_path / "last.pth")
    save_checkpoint(State(steps_per_epoch=10, step=20, epoch=2), tmp_path / "best.pth")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "best.pth"


def test_a_folder_with_nothing_but_damaged_checkpoints_is_not_an_empty_one(tmp_path):
    assert newest_checkpoint(tmp_path / "new") == (None, {})
    (tmp_path / "last.pth").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=r"no checkpoint.*last\.pth.*start over"):
        newest_checkpoint(tmp_path)
