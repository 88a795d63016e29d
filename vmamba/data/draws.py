"""Random numbers that are functions of seed, epoch and index.

Nothing is drawn from the state of a generator that goes on from image to image, so that any number of worker
processes and of training processes, and a run that was stopped and resumed, sees the same images.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

ORDER, IMAGE, MIXUP, MODEL, SIZE = range(5)  # independent streams, the second word of a key


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the states of Python's, NumPy's and PyTorch's CPU generators back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_generators(*key: int) -> None:
    """Seed the three from `key`."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(_integer(words))  # torch.manual_seed would seed the GPUs too


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of an epoch's images (length,)."""
    return torch.randperm(length, generator=generator(seed, ORDER, epoch))


def generator(*key: int) -> torch.Generator:
    """One of its own for `key`."""
    return torch.Generator().manual_seed(_integer(np.random.SeedSequence(key).generate_state(4)))


def _integer(words: np.ndarray) -> int:
    return int(words[0]) << 32 | int(words[1])
