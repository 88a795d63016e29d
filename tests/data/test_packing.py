"""A batch comes whole from the process that has loaded it, in one piece of memory."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import get_worker_info

from vmamba.config import get_config
from vmamba.data.loaders import EvalLoader, Examples
from vmamba.data.packing import Packed, pack


@dataclass(frozen=True)
class Inside:
    values: torch.Tensor
    name: str


BATCH = {
    "images": torch.arange(24, dtype=torch.uint8).view(2, 3, 4)[:, :, ::2],  # not contiguous
    "labels": torch.tensor([5, 7]),
    "nothing": torch.empty(0, 3, 2, dtype=torch.float16),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "more": [(torch.tensor([True, False, True]), 1, "a"), Inside(torch.tensor([2.5]), "b"), None],
}


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, Inside):
        return same(vars(ours), vars(theirs))
    return ours == theirs


@pytest.mark.parametrize("batch", [BATCH, {"labels": []}, torch.ones(3), "text"])
def test_what_is_unpacked_is_what_was_packed(batch):
    packed = pack(batch)
    assert packed.data.is_shared() and same(packed.unpack(), batch)


def test_the_tensors_are_pinned_as_one(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = torch.utils.data._utils.pin_memory.pin_memory([pack({"a": torch.zeros(2, 2, dtype=torch.uint8)}), ["x"]])
    assert pinned[0].unpack()["a"].tolist() == [[1, 1], [1, 1]] and pinned[1] == ["x"]


class Batches:
    def __len__(self):
        return 4

    def load(self, index):
        return index, get_worker_info() is not None


def of_many(samples):
    numbers, loaded = zip(*samples, strict=True)
    assert all(loaded)
    return {**BATCH, "numbers": torch.tensor(numbers)}


def sent(batch):
    return batch


def test_loading_processes_send_one_tensor_a_batch(monkeypatch):
    config = get_config(None, ["DATA.NUM_WORKERS", "1", "DATA.BATCH_SIZE", "2", "DEVICE", "cpu"])
    loading = EvalLoader(config, Examples(config, Batches(), sent, training=False), 0, 1, of_many)
    assert all(isinstance(loaded[0], Packed) for loaded in loading._loader)
    batches = [*loading]
    assert [batch.pop("numbers").tolist() for batch in batches] == [[0, 1], [2, 3]] and same(batches, [BATCH] * 2)
