"""Loaders of any task's batches: what they give is a function of seed, epoch and index, and their errors are values."""

import atexit
import errno
import logging
import os
import random
import re
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from yacs.config import CfgNode

from vmamba.data.draws import IMAGE, permutation, preserved_generators, seed_generators
from vmamba.data.images import UnreadableImage
from vmamba.data.packing import Packed, pack
from vmamba.data.sampling import numbered
from vmamba.errors import UserError
from vmamba.signals import leave_them_to_the_parent

logger = logging.getLogger("vmamba")

Key = tuple[int, ...]  # epoch, index of the sample, and where it comes again in an epoch, which time that is
Example = tuple[Any, list[str]] | str  # what becomes of a sample (None: nothing), the unreadable; or what ends the run
Order = Callable[[int], Sequence[int]]  # of an epoch the indices of its samples, some perhaps several times
Seconds = float  # of a core: what was computed, without waiting for files

_OF_A_DISK = "EIO ESTALE ETIMEDOUT EREMOTEIO"
_OF_A_NETWORK = "EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENOTCONN ECONNRESET ECONNABORTED ESHUTDOWN"
_PASSING = {getattr(errno, name) for name in f"{_OF_A_DISK} {_OF_A_NETWORK}".split() if hasattr(errno, name)}
_DRY = 2  # batches that a DRY_RUN evaluates
_REPLACEMENTS = 10  # samples tried in the place of an unreadable one
# Seconds after which the thread that decodes lets that go on by which the training process gets a batch.
_SWITCH = 0.0005


class Source(Protocol):
    """Samples by index."""

    def __len__(self) -> int: ...

    # And may have `name(index)`, for a sentence.
    # And may have `groups`, a number for each sample: those of a micro-batch for training are of one group.
    # And may have `contents()`, a dict of what `Loader.contents` tells beside their number: `checksum`, which other
    # samples would change, and `drawn_by`, the key by which those held out are drawn from those that are there.

    def load(self, index: int) -> Any:
        """Raises UnreadableImage where the run may go on without it, UserError where not."""


class Examples(Dataset):
    """Samples of `source` as `transform` makes them, by (epoch, index), a batch at a time."""

    def __init__(self, config: CfgNode, source: Source, transform: Callable[[Any], Any], *, training: bool):
        self.source, self.transform, self.training = source, transform, training
        self.seed, self.skip, self.patience = config.SEED, config.DATA.SKIP_BAD_IMAGES, config.DATA.RETRY_SECONDS
        self._at = torch.full((max(1, config.DATA.NUM_WORKERS),), -1).share_memory_()  # what each loading process loads

    def __getitems__(self, keys: Sequence[Key]) -> tuple[list[Example], Seconds]:
        """What DataLoader calls for a batch.  Keeping the generators' states is dear, so it is done once here."""
        start = time.thread_time()
        with preserved_generators():
            examples = [self._example(key) for key in keys]
        return examples, time.thread_time() - start

    def _example(self, key: Key) -> Example:
        """An error is a value here: raised in a worker process it would arrive wrapped in a traceback."""
        seed_generators(self.seed, IMAGE, *key)
        unreadable = []
        for index in self._candidates(key[1]):
            try:
                return self._transformed(self._load(index), index), unreadable
            except UnreadableImage as error:
                if _may_pass(error):
                    return f"{error}, for {self.patience:g} s (DATA.RETRY_SECONDS); look after that disk, and go on"
                if not self.skip:
                    return f"{error}; mend or remove it, or set DATA.SKIP_BAD_IMAGES true"
                unreadable.append(str(error))
            except UserError as error:
                return str(error)
        if self.training:
            return f"{len(unreadable)} images in a row are unreadable, at last: {unreadable[-1]}; check the data path"
        return None, unreadable

    def _load(self, index: int) -> Any:
        """From the source; where the system fails to read, again and again for a while."""
        worker = get_worker_info()
        self._at[worker.id if worker else 0] = index
        end, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return self.source.load(index)
            except UnreadableImage as error:
                left = end - time.monotonic()
                if left <= 0 or not _may_pass(error):
                    raise
                if pause == 0.5:
                    logger.warning(f"{error}; trying again for {self.patience:g} s")
                time.sleep(min(pause, left))
                pause = min(2 * pause, 5.0)

    def _transformed(self, sample: Any, index: int) -> Any:
        try:
            return self.transform(sample)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            raise UnreadableImage(f"cannot augment {self._name(index)}: there is too little memory for it") from error

    def loading(self, worker: int) -> str:
        """The name of what the `worker`-th loading process is at, or was last."""
        index = int(self._at[worker])
        return self._name(index) if index >= 0 else "its start"

    def _name(self, index: int) -> str:
        return f"'{self.source.name(index)}'" if hasattr(self.source, "name") else f"sample {index}"

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        for _ in range(_REPLACEMENTS if self.training else 0):  # a training batch keeps its size
            yield random.randrange(len(self.source))


def whole_already(batch: Any) -> Any:
    return batch


class Loader:
    """Iterates over batches.  A UserError met in a worker process is raised here, as one sentence.

    `finish` makes a batch whole on the device that computes with it; whoever takes a batch there calls it.
    `skipped` counts the unreadable images that this process met since the iteration began (DATA.SKIP_BAD_IMAGES), each
    once: drawn to replace another it is met again.  `seconds_an_image` says how long a core took for one so far.
    """

    def __init__(
        self,
        config: CfgNode,
        examples: Examples,
        batches: Iterable[list[Key]],
        collate: Callable[[list[Any]], Any] = default_collate,
        finish: Callable[[Any], Any] = whole_already,
    ):
        self.examples, self.collate, self.finish = examples, collate, finish
        workers, self.timeout = config.DATA.NUM_WORKERS, config.DATA.TIMEOUT
        self._seconds, self._images = 0.0, 0
        self._running: Iterator[Any] | None = None
        self._skipped: set[str] = set()
        self._named: set[str] = set()
        self._loader = DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=_Collate(collate),
            num_workers=workers,
            prefetch_factor=config.DATA.PREFETCH_FACTOR if workers else None,
            persistent_workers=config.DATA.PERSISTENT_WORKERS and workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=config.DATA.PIN_MEMORY and config.DEVICE != "cpu" and torch.cuda.is_available(),
            generator=torch.Generator(),  # else starting an iteration draws from PyTorch's global generator
        )

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def ahead(self) -> bool:
        """Whether a thread shall load and finish batches: where finishing waits for the device (`finish.waits`), but
        not where this process loads, with the generators that a step draws from too."""
        return getattr(self.finish, "waits", False) and self._loader.num_workers > 0

    @property
    def skipped(self) -> int:
        return len(self._skipped)

    def contents(self) -> dict[str, Any]:
        """Which samples these are, for the state of a run: their number, and what the source tells."""
        source = self.examples.source
        return {"images": len(source), **(source.contents() if hasattr(source, "contents") else {})}

    def class_names(self) -> list[str]:
        """What the data calls each class, by its number; none where it does not tell."""
        return list(getattr(self.examples.source, "class_names", ()))

    @property
    def seconds_an_image(self) -> Seconds:
        """Reading, decoding, augmenting and collating, waiting for files left out; NaN before the first batch."""
        return self._seconds / self._images if self._images else float("nan")

    def __iter__(self) -> Iterator[Any]:
        self._skipped = set()
        try:
            for loaded in self._iterator():
                if isinstance(loaded, str):
                    raise UserError(loaded)
                batch, unreadable, images, seconds, kept = loaded
                self._images += images
                self._seconds += seconds
                self._count(unreadable)
                self._note(kept)
                if batch is not None:
                    yield batch.unpack() if isinstance(batch, Packed) else batch
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            dead = self._dead(error)
            self._end()
            sentence = _lacking(error) or self._lost_worker(str(error), dead)
            if sentence is None:
                raise
            raise UserError(sentence) from error

    def _note(self, kept: list[int]) -> None:
        """Which examples of the next batch are in it, by their places."""

    def _iterator(self) -> Iterator[Any]:
        with _without_a_word_of_children():
            iterator = iter(self._loader)
        workers = getattr(iterator, "_workers", ())
        for process in workers:
            process.terminate = process.kill  # how PyTorch ends one that hangs: they are deaf to SIGTERM
            _loading.add(process)
        if workers and not isinstance(iterator._try_get_data, _Patience):
            iterator._try_get_data = _Patience(iterator, self.timeout)
            # The garbage collector calls this before the iterator's own end, everything else behind it.
            weakref.finalize(iterator, _kill_at_the_end, os.getpid(), workers).atexit = False
        self._running = iterator
        return iterator

    def _end(self) -> None:
        """End the loading processes of an iteration that has failed, so that the next one begins with new ones."""
        if hasattr(self._running, "_workers"):
            _kill_at_the_end(os.getpid(), self._running._workers)
            with suppress(RuntimeError):
                self._running.__del__()
        self._running = self._loader._iterator = None

    def _dead(self, error: Exception) -> list[int]:
        """The loading processes that have ended; one that was killed as it sent breaks a connection a moment before."""
        workers = getattr(self._running, "_workers", ())
        end = time.monotonic() + (2 if isinstance(error, (EOFError, ConnectionError)) else 0)
        while not any(process.exitcode for process in workers) and time.monotonic() < end:
            time.sleep(0.01)
        return [number for number, process in enumerate(workers) if process.exitcode]

    def _lost_worker(self, text: str, dead: list[int]) -> str | None:
        """What a loading process that was killed, or hangs, was at; None for another error."""
        if dead or re.search(r"worker.*(exited unexpectedly|killed by signal)", text):
            at = f" at {', '.join(self.examples.loading(worker) for worker in dead)}" if dead else ""
            return (
                f"a loading process was killed{at}, often for want of memory (dmesg tells); lower DATA.NUM_WORKERS, or "
                f"set it to 0 to load in the training process"
            )
        if "DataLoader timed out" in text:
            at = ", ".join(map(self.examples.loading, range(self._loader.num_workers)))
            return (
                f"no batch came for {self.timeout:g} s (DATA.TIMEOUT), the loading processes being at {at}; look after "
                f"the disk that these lie on, or raise DATA.TIMEOUT where a batch takes so long"
            )
        return None

    def _count(self, unreadable: list[str]) -> None:
        self._skipped.update(unreadable)
        for sentence in unreadable:
            if sentence not in self._named:
                self._named.add(sentence)
                logger.warning("skipped an image: %s", sentence)


class TrainLoader(Loader):
    """Yields ACCUMULATION_STEPS micro-batches an optimiser step, of the steps that `set_epoch` names.

    The samples of step s are those at s*G to (s+1)*G of the epoch's order, by default a permutation, G being the
    global batch.  `deal`: the processes take them in turns, so that neighbours go to different ones; else in pieces.
    Raises UserError when the samples do not fill one.
    """

    def __init__(
        self,
        config: CfgNode,
        examples: Examples,
        rank: int,
        world_size: int,
        collate: Callable[[list[Any]], Any] = default_collate,
        finish: Callable[[Any], Any] = whole_already,
        order: Order | None = None,
        deal: bool = False,
    ):
        self.images = len(examples.source)
        groups = getattr(examples.source, "groups", None)
        self._batches = TrainingBatches(config, self.images, rank, world_size, groups, order, deal)
        self.steps_per_epoch: int = self._batches.steps
        super().__init__(config, examples, self._batches, collate, finish)

    def set_epoch(self, epoch: int, start_step: int = 0, end_step: int | None = None) -> None:
        """Let the next iteration run through `epoch` from optimiser step `start_step` up to `end_step`."""
        self._batches.epoch, self._batches.start = epoch, start_step
        self._batches.end = self.steps_per_epoch if end_step is None else end_step


class EvalLoader(Loader):
    """This process's share of the samples: over all processes each comes exactly once, without padding; of a DRY_RUN
    the first batches alone.

    `given` are the indices of those that came so far in this iteration, in order.
    """

    def __init__(
        self,
        config: CfgNode,
        examples: Examples,
        rank: int,
        world_size: int,
        collate: Callable[[list[Any]], Any] = default_collate,
        finish: Callable[[Any], Any] = whole_already,
    ):
        self.images = len(examples.source)
        mine, size = range(rank, self.images, world_size), config.DATA.BATCH_SIZE
        starts = range(0, len(mine), size)[: _DRY if config.DRY_RUN else None]
        self._batches = [[(0, index) for index in mine[start : start + size]] for start in starts]
        self.given: list[int] = []
        super().__init__(config, examples, self._batches, collate, finish)

    def __iter__(self) -> Iterator[Any]:
        self.given, self._next = [], iter(self._batches)
        return super().__iter__()

    def _note(self, kept: list[int]) -> None:
        keys = next(self._next)
        self.given += [keys[place][1] for place in kept]


class TrainingBatches:
    """The keys of one process's micro-batches: each of images of one of `groups` where there are such, or in an `order`
    of its own."""

    def __init__(
        self,
        config: CfgNode,
        images: int,
        rank: int,
        world_size: int,
        groups: Sequence[int] | None = None,
        order: Order | None = None,
        deal: bool = False,
    ):
        self.groups, self.order, self.deal = groups, order, deal
        self.seed, self.images, self.rank, self.world_size = config.SEED, images, rank, world_size
        self.micro, self.accumulation = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
        total = self.micro * world_size * self.accumulation
        self.steps = images // total
        self.epoch, self.start, self.end = 0, 0, self.steps
        if not self.steps:
            raise UserError(
                f"{images} training images do not fill one batch of {total} = DATA.BATCH_SIZE {self.micro} x "
                f"{world_size} processes x TRAIN.ACCUMULATION_STEPS {self.accumulation}; choose a smaller --batch-size"
            )

    def __len__(self) -> int:
        return (self.end - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        together, mine = self.world_size * self.micro, slice(self.rank, None, self.world_size)
        if not self.deal:
            mine = slice(self.rank * self.micro, (self.rank + 1) * self.micro)
        first, last = self.start * self.accumulation, self.end * self.accumulation
        keys = islice(self._keys(), first * together, None)
        for _ in range(first, last):
            yield [(self.epoch, *key) for key in list(islice(keys, together))[mine]]

    def _keys(self) -> Iterable[tuple[int, ...]]:
        """Of the epoch's samples, without the epoch: made one by one, since they take more memory than the order."""
        if self.order is not None:
            return numbered(self.order(self.epoch))
        order = permutation(self.seed, self.epoch, self.images).tolist()
        if self.groups is not None:
            order = in_groups(order, self.groups, self.micro)
        return zip(order, strict=True)


def in_groups(order: Sequence[int], groups: Sequence[int], size: int) -> list[int]:
    """`order` so that of each run of `size` images all are of one group, as long as a group has as many left."""
    waiting: dict[int, list[int]] = {}
    found = []
    for index in order:
        mine = waiting.setdefault(groups[index], [])
        mine.append(index)
        if len(mine) == size:
            found += mine
            waiting[groups[index]] = []
    return found + [index for group in sorted(waiting) for index in waiting[group]]


class _Collate:
    """A batch, None where no example is left, with the unreadable of its examples, their number, the time they took and
    the places of those that are left; or the first error among them."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, loaded: tuple[list[Example], Seconds]) -> tuple[Any, list[str], int, Seconds, list[int]] | str:
        examples, seconds = loaded
        start = time.thread_time()
        for example in examples:
            if isinstance(example, str):
                return example
        kept = [place for place, (example, _) in enumerate(examples) if example is not None]
        batch = self.collate([examples[place][0] for place in kept]) if kept else None
        if batch is not None and get_worker_info():
            batch = pack(batch)
        unreadable = [sentence for _, names in examples for sentence in names]
        return batch, unreadable, len(examples), seconds + time.thread_time() - start, kept


_loading: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # processes


@atexit.register
def _end_loading() -> None:
    """Where an error ends this process in the middle of an iteration: Python would ask them by SIGTERM, and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which PyTorch would say that they were killed
    for process in _loading:
        process.kill()


@contextmanager
def _without_a_word_of_children() -> Iterator[None]:
    """Keep the handler of SIGCHLD as it is: PyTorch's raises an error wherever the process is, be it in a save."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    yield
    if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


class _Patience:
    """Asks PyTorch's iterator for a batch, which looks every second whether a loading process has died, and gives up
    after `limit` seconds (0: never).  PyTorch's own limit would put off that look to its end.

    It holds the iterator weakly: in a cycle with it, the queues would be ended before it, which then waits five seconds
    for each of its processes.
    """

    def __init__(self, iterator: Any, limit: float):
        self.iterator, self.limit, self.since = weakref.ref(iterator), limit, None

    def __call__(self, *args: Any) -> tuple[bool, Any]:
        since = time.monotonic() if self.since is None else self.since
        iterator = self.iterator()
        found = type(iterator)._try_get_data(iterator, *args or (1.0,))
        self.since = None if found[0] else since
        if self.since is not None and 0 < self.limit < time.monotonic() - since:
            raise RuntimeError("DataLoader timed out")
        return found


def _kill_at_the_end(parent: int, workers: list[BaseProcess]) -> None:
    """Let the end of an iterator not wait five seconds for each of its processes, which cannot hear of it: they hang,
    or the garbage collector has ended their queues first.  They are not killed at once, for one may hold the lock of
    what tells them all."""
    for process in workers if os.getpid() == parent else ():
        process.join = partial(_kill_and_join, process)


def _kill_and_join(process: BaseProcess, timeout: float | None = None) -> None:
    process.kill()
    type(process).join(process, timeout)


def _start_worker(worker: int) -> None:
    leave_them_to_the_parent()
    sys.setswitchinterval(_SWITCH)


def _out_of_memory(error: Exception) -> bool:
    """Python's, Pillow's or NumPy's MemoryError, or what PyTorch raises for want of a CPU's memory."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _lacking(error: Exception) -> str | None:
    """What the system lacks where loading failed for it; None for another error."""
    text = str(error)
    if _out_of_memory(error):
        return "there is too little memory to put a batch together; lower DATA.BATCH_SIZE or DATA.NUM_WORKERS"
    if getattr(error, "errno", None) == errno.EMFILE or re.search("Too many open files|ancdata", text):
        return (
            "the loading processes have too many files open; raise the limit (ulimit -n 65536), or set "
            "DATA.NUM_WORKERS 0"
        )
    if re.search("Bus error|shared memory|No space left on device|Cannot allocate memory", text):
        return (
            "the loading processes have too little shared memory for their batches; enlarge /dev/shm (docker run "
            "--shm-size 8g), or lower DATA.NUM_WORKERS or DATA.BATCH_SIZE; with DATA.NUM_WORKERS 0 none is needed"
        )
    return None


def _may_pass(error: UnreadableImage) -> bool:
    """Whether the system failed, of which a network's disks recover, and not the file."""
    reason = error.__cause__
    return isinstance(reason, OSError) and reason.errno in _PASSING
