"""Loading processes: signals that are not for them, and what the system lacks."""

import errno
import gc
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from vmamba.config import get_config
from vmamba.data.images import UnreadableImage, reading
from vmamba.data.loaders import EvalLoader, Examples, TrainLoader, _lacking
from vmamba.errors import UserError
from vmamba.runtime.feed import Ahead
from vmamba.signals import STOP_SIGNALS

from ..forked import start_server


class Slow:
    """Sixty samples, each of them the process that loads it; a hundredth of a second each."""

    def __len__(self):
        return 60

    def load(self, index):
        time.sleep(0.01)
        return os.getpid() if get_worker_info() else 0


def nothing(sample):
    return sample


def loader(workers=2, source=None, *opts, transform=nothing):
    config = get_config(None, ["DATA.NUM_WORKERS", str(workers), "DATA.BATCH_SIZE", "2", "DEVICE", "cpu", *opts])
    return EvalLoader(config, Examples(config, source or Slow(), transform, training=False), 0, 1)


def test_a_loader_ends_with_its_last_reference():
    """Not in the garbage collector, which ends an iterator's queues before it: it would then wait five seconds for
    each of its processes, which cannot hear of its end."""
    loading = loader()
    assert sum(len(batch) for batch in loading) == 60
    iterator, processes = weakref.ref(loading._running), list(loading._running._workers)
    gc.disable()
    try:
        del loading
        assert iterator() is None and not any(process.is_alive() for process in processes)
    finally:
        gc.enable()


def test_a_loader_that_the_garbage_collector_ends_waits_for_nothing():
    """As where an error is kept with its frames, which hold the loader, in a frame of them."""
    gc.collect()
    loading = loader()
    next(iter(loading))
    processes, start = list(loading._running._workers), time.monotonic()
    loading.itself = loading
    del loading
    gc.collect()
    assert time.monotonic() - start < 4 and not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_stop_signals_do_not_end_a_loading_process_and_its_parent_does(method, monkeypatch):
    if method == "forkserver":
        start_server()  # with what its processes would import one by one
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # how long a hanging one is waited for
    loading = loader()
    loading._loader.multiprocessing_context = method
    batches = iter(loading)
    processes = {int(pid) for _ in range(2) for pid in next(batches)}
    for pid in processes:
        for signum in STOP_SIGNALS:
            os.kill(pid, signum)
    assert sum(len(batch) for batch in batches) == 56
    iterator = loading._loader._iterator
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)  # it hangs
    iterator._shutdown_workers()
    for process in iterator._workers:
        process.join(10)
        assert not process.is_alive()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "--shm-size"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "was killed, often for want of memory"),
    ],
)
def test_what_the_system_lacks_is_a_sentence(error, sentence):
    class Lacking(Slow):
        def load(self, index):
            raise error

    with pytest.raises(UserError, match=sentence):
        list(loader(0, Lacking()))
    assert _lacking(RuntimeError("a bug")) is None


class Named(Slow):
    """A sample that something happens at, with the names of files."""

    def name(self, index):
        return f"images/{index}.png"

    def load(self, index):
        if index == 31:
            self.happens()
        return 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_memory_is_too_small_for_is_named_and_may_be_skipped(error, workers, caplog):
    def transform(sample):
        if sample == 31:
            raise error
        return sample

    class Plain(Named):
        def load(self, index):
            return index

    with pytest.raises(UserError, match="cannot augment 'images/31.png': there is too little memory for it; mend or"):
        list(loader(workers, Plain(), transform=transform))
    skipping = loader(workers, Plain(), "DATA.SKIP_BAD_IMAGES", True, transform=transform)
    assert sum(len(batch) for batch in skipping) == 59 and skipping.skipped == 1
    assert "too little memory to put a batch together; lower DATA.BATCH_SIZE" in _lacking(error)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loading_process_that_is_killed_is_a_sentence_with_its_file(workers):
    class Killed(Named):
        def happens(self):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match="a loading process was killed at 'images/31.png', often for want of memory"):
        list(loader(workers, Killed()))


def test_a_loading_process_that_hangs_is_a_sentence_with_its_file():
    class Hangs(Named):
        def happens(self):
            time.sleep(1000)

    start = time.monotonic()
    with pytest.raises(UserError, match=r"no batch came for 1 s \(DATA.TIMEOUT\), .* being at 'images/31.png'; look"):
        list(loader(1, Hangs(), "DATA.TIMEOUT", "1"))
    assert time.monotonic() - start < 5  # which PyTorch would wait for it once more


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_for_a_while_is_tried_again(workers, caplog, tmp_path):
    class Fails(Named):
        def happens(self):
            with (tmp_path / "tries").open("a") as tries:
                tries.write(".")
            if (tmp_path / "tries").stat().st_size < 3:
                with reading("images/31.png"):
                    raise OSError(errno.EIO, "Input/output error")

    assert sum(map(len, loader(workers, Fails()))) == 60
    assert (tmp_path / "tries").read_text() == "..."


def test_a_disk_that_fails_for_good_ends_the_run_and_skips_nothing():
    class Fails(Named):
        def happens(self):
            with reading("images/31.png"):
                raise OSError(errno.ESTALE, "Stale file handle")

    options = ("DATA.RETRY_SECONDS", "1", "DATA.SKIP_BAD_IMAGES", "true")
    with pytest.raises(UserError, match=r"cannot read 'images/31.png': .*Stale file handle, for 1 s .*look after that"):
        list(loader(0, Fails(), *options))


def test_a_file_that_vanished_is_not_waited_for():
    class Vanished(Named):
        def happens(self):
            with reading("images/31.png"):
                Path("nowhere/31.png").read_bytes()

    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot read 'images/31.png': No such file"):
        list(loader(0, Vanished()))
    assert time.monotonic() - start < 5


def test_of_a_batch_without_readable_samples_nothing_is_left():
    class Unreadable(Slow):
        def load(self, index):
            raise UnreadableImage(f"cannot read {index}")

    config = get_config(None, ["DATA.NUM_WORKERS", "0", "DATA.SKIP_BAD_IMAGES", "true", "DEVICE", "cpu"])
    loading = EvalLoader(config, Examples(config, Unreadable(), nothing, training=False), 0, 1)
    assert list(loading) == [] and loading.skipped == 60
    Unreadable.load = Slow.load  # they were mended in the meantime
    assert sum(map(len, loading)) == 60 and loading.skipped == 0


def test_batches_are_pinned_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for pin, device, pinned in (("true", "auto", True), ("false", "auto", False), ("true", "cpu", False)):
        config = get_config(None, ["DATA.NUM_WORKERS", "0", "DATA.PIN_MEMORY", pin, "DEVICE", device])
        loading = EvalLoader(config, Examples(config, Slow(), nothing, training=False), 0, 1)
        assert loading._loader.pin_memory is pinned


def test_an_unreadable_sample_counts_once_though_it_is_drawn_in_the_place_of_others():
    met = []

    class Half(Slow):
        def load(self, index):
            if index % 2:
                met.append(index)
                raise UnreadableImage(f"cannot read {index}")
            return torch.zeros(1)

    options = ["DATA.NUM_WORKERS", "0", "DATA.SKIP_BAD_IMAGES", "true", "DATA.BATCH_SIZE", "4", "DEVICE", "cpu"]
    config = get_config(None, options)
    loading = TrainLoader(config, Examples(config, Half(), nothing, training=True), 0, 1)
    assert len(list(loading)) == 15
    assert loading.skipped == len(set(met)) == 30 < len(met)


@pytest.mark.parametrize("workers", [0, 2])
def test_how_long_a_core_takes_for_an_image_leaves_waiting_out(workers):
    class Busy(Slow):
        def load(self, index):
            start = time.thread_time()
            while time.thread_time() - start < 0.002:
                pass
            return super().load(index)  # which sleeps for 10 ms

    loading = loader(workers, Busy())
    assert math.isnan(loading.seconds_an_image)
    list(loading)
    assert 0.002 <= loading.seconds_an_image < 0.006


ENDED = """
from tests.data.test_loaders import loader
for batch in loader(1):
    raise RuntimeError("a bug")
"""


def test_an_error_ends_the_process_though_others_still_load():
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", ENDED], cwd=root, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.endswith("RuntimeError: a bug\n")


def test_a_thread_may_load():
    """It starts the processes, as the thread does that is ahead of a step."""
    take, found = Ahead(partial(next, iter(loader(2)))), []
    with pytest.raises(StopIteration):
        while True:
            found += take().tolist()
    assert len(found) == 60 and len({*found} - {os.getpid()}) == 2
