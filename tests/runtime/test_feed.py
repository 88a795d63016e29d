"""Batches on their way to the device: what they are made of gets there, each once and in order."""

import pytest
import torch

from vmamba.runtime.feed import feed

from .conftest import CPU

BATCHES = [{"images": torch.full((2,), float(number)), "sizes": [(number, 1)], "names": ["a"]} for number in range(3)]


def test_batches_arrive_finished_in_their_order():
    taken = []

    def batches():
        for number, batch in enumerate(BATCHES):
            taken.append(number)
            yield batch

    ready = feed(batches(), CPU.device, lambda batch: (batch["images"] + 1, batch["sizes"]))
    assert next(ready)[0].tolist() == [1, 1]
    assert taken == [0]  # no batch is loaded before it is asked for: a run stops without waiting for one
    assert [(images.tolist(), sizes) for images, sizes in ready] == [([2, 2], [(1, 1)]), ([3, 3], [(2, 1)])]


@pytest.mark.gpu
def test_a_gpu_gets_the_same_while_it_computes():
    """The memory of a batch is not given to the next copy while the batch is still read."""
    device, parts = torch.device("cuda", 0), 20
    batches = [[torch.full((2**20,), number, dtype=torch.uint8).pin_memory(), [number]] for number in range(parts)]
    busy, sums = torch.randn(4096, 4096, device=device), []
    for pixels, (number,) in feed(batches, device, lambda batch: [batch[0].float() * 2, batch[1]]):
        assert isinstance(number, int)
        for _ in range(4):
            busy = (busy @ busy).clamp(-1, 1)  # the copy of the next batch is done long before this
        sums.append(pixels.double().sum())
        del pixels
    assert torch.stack(sums).tolist() == [2 * number * 2**20 for number in range(parts)]
