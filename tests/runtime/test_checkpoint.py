"""Checkpoints: wholly written or not at all, and read with one sentence for everything that is not one."""

import os
import pickle
import resource

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vmamba.errors import UserError
from vmamba.runtime.checkpoint import (
    load_weights,
    newest_checkpoint,
    read_checkpoint,
    read_ema_weights,
    read_weights,
    save_checkpoint,
)


class State:
    """What save_checkpoint asks of a state."""

    def __init__(self, **content):
        self.content = content

    def state_dict(self):
        return self.content


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
    with pytest.raises(UserError, match=r"last\.pth.*too large.*--output"):
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


def test_weights_come_from_our_files_state_dicts_and_safetensors(tmp_path):
    weights, ema = nn.Linear(2, 3).state_dict(), nn.Linear(2, 3).state_dict()
    torch.save({"model": weights, "model_ema": ema, "epoch": 1}, tmp_path / "ours.pth")
    torch.save(weights, tmp_path / "plain.pth")
    save_file(weights, tmp_path / "plain.safetensors")
    for name in ("ours.pth", "plain.pth", "plain.safetensors"):
        read = read_weights(tmp_path / name)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], weights[key]) for key in weights)
    assert torch.equal(read_ema_weights(tmp_path / "ours.pth")["weight"], ema["weight"])
    assert read_ema_weights(tmp_path / "plain.pth") is None


def test_a_file_without_weights_is_named(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth' holds no weights"):
        read_weights(tmp_path / "other.pth")


def test_another_architecture_is_listed_by_kind_and_nothing_is_loaded():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {
        "0.weight": torch.ones(3, 2),
        "0.bias": torch.ones(5),
        "1.weight": torch.ones(4, 3),
        "2.bias": torch.ones(4),
    }
    with pytest.raises(UserError) as error:
        load_weights(model, weights, "other.pth")
    assert "1 missing: 1.bias" in str(error.value)
    assert "1 unexpected: 2.bias" in str(error.value)
    assert "1 of another shape: 0.bias (5,) instead of (3,)" in str(error.value)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_the_newest_that_loads_is_found_and_the_skipped_are_named(tmp_path):
    for age, name in enumerate(["last.pth", "best.pth", "old.pth"]):
        save_checkpoint(State(name=name), tmp_path / name)
        os.utime(tmp_path / name, ns=(10**9 * (9 - age),) * 2)
    (tmp_path / ".last.pth.tmp").write_bytes(b"what a killed process left")
    assert newest_checkpoint(tmp_path) == (tmp_path / "last.pth", [])
    os.truncate(tmp_path / "last.pth", 100)
    os.utime(tmp_path / "last.pth", ns=(10**10,) * 2)
    path, skipped = newest_checkpoint(tmp_path)
    assert path == tmp_path / "best.pth"
    assert len(skipped) == 1
    assert "last.pth" in skipped[0]


def test_a_folder_with_nothing_but_damaged_checkpoints_is_not_an_empty_one(tmp_path):
    assert newest_checkpoint(tmp_path / "new") == (None, [])
    (tmp_path / "last.pth").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=r"no checkpoint.*last\.pth.*start over"):
        newest_checkpoint(tmp_path)
