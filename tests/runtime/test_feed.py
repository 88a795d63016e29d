"""Batches on their way to the device: what they are made of gets there, each once and in order; and the waiting."""

import threading
import time

import pytest
import torch

from vmamba.runtime.feed import Ahead, Feed
from vmamba_kernels.private import keep_gpu_busy

from .conftest import CPU

BATCHES = [{"images": torch.full((2,), float(number)), "sizes": [(number, 1)], "names": ["a"]} for number in range(3)]


def test_batches_arrive_finished_in_their_order():
    taken = []

    def batches():
        for number, batch in enumerate(BATCHES):
            taken.append(number)
            yield batch

    ready = Feed(batches(), CPU.device, lambda batch: (batch["images"] + 1, batch["sizes"]))
    assert next(ready)[0].tolist() == [1, 1]
    assert taken == [0]  # no batch is loaded before it is asked for: a run stops without waiting for one
    assert [(images.tolist(), sizes) for images, sizes in ready] == [([2, 2], [(1, 1)]), ([3, 3], [(2, 1)])]


def late(number):
    for _ in range(number):
        time.sleep(0.02)
        yield torch.ones(2)


def test_waiting_for_batches_is_told_without_the_work_on_them():
    start, ready = time.perf_counter(), Feed(late(4), CPU.device, lambda batch: batch)
    for _ in ready:
        time.sleep(0.03)
    seconds = time.perf_counter() - start
    assert 0.08 <= ready.waited() <= seconds - 0.12


@pytest.mark.gpu
def test_a_gpu_waits_only_while_it_has_nothing_to_compute():
    device = torch.device("cuda", 0)
    idle = Feed(late(10), device, lambda batch: batch)
    for batch in idle:
        batch.add_(1)
    assert 0.18 <= idle.waited() < 0.5  # but for the first, each after the addition is done
    busy = Feed(late(10), device, lambda batch: batch)
    for _ in busy:
        keep_gpu_busy(100_000_000)  # cycles: 50 ms and more
    assert busy.waited() < 0.1  # for the first


@pytest.mark.gpu
def test_a_gpu_gets_the_same_while_it_computes():
    """The memory of a batch is not given to the next copy while the batch is still read."""
    device, parts = torch.device("cuda", 0), 20
    batches = [[torch.full((2**20,), number, dtype=torch.uint8).pin_memory(), [number]] for number in range(parts)]
    busy, sums = torch.randn(4096, 4096, device=device), []
    for pixels, (number,) in Feed(batches, device, lambda batch: [batch[0].float() * 2, batch[1]]):
        assert isinstance(number, int)
        for _ in range(4):
            busy = (busy @ busy).clamp(-1, 1)  # the copy of the next batch is done long before this
        sums.append(pixels.double().sum())
        del pixels
    assert torch.stack(sums).tolist() == [2 * number * 2**20 for number in range(parts)]


def test_a_thread_makes_the_next_while_the_last_is_in_use():
    made, threads = [], set()

    def make():
        threads.add(threading.get_ident())
        if len(made) == 3:
            raise StopIteration
        made.append(len(made))
        return made[-1]

    ahead = Ahead(make)
    assert made == [] and ahead() == 0
    for expected in (1, 2):
        while len(made) == expected:  # until the thread is ahead
            time.sleep(0.001)
        assert ahead() == expected
    for _ in range(2):
        with pytest.raises(StopIteration):
            ahead()
    assert threading.get_ident() not in threads and len(threads) == 1


@pytest.mark.gpu
def test_what_waits_for_a_gpu_is_done_by_a_thread():
    """A batch is there at once though making it waits for the GPU, and is whole when the caller's stream reads it."""

    def finish(batch):
        keep_gpu_busy(20_000_000)
        sent = batch * 2
        torch.cuda.current_stream().synchronize()
        return sent

    device, sums = torch.device("cuda", 0), []
    batches = [torch.full((2**20,), number, dtype=torch.int32).pin_memory() for number in range(8)]
    for batch in Feed(batches, device, finish, ahead=True):
        sums.append(batch.double().sum())
        del batch
    assert torch.stack(sums).tolist() == [2 * number * 2**20 for number in range(8)]
