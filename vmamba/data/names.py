"""Many names in one array, which processes share: a list of strings is copied into each process that reads it, bit by
bit, since reading counts references."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Names(Sequence[str]):
    """The strings of `names`, in their order."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self.text = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)])  # behind each, and the first's beginning

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> "Names":
        """From the arrays of another."""
        names = cls(())
        names.text, names.ends = text, ends
        return names

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self.text[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogatepass")


class Labelled(Sequence[tuple[str, int]]):
    """(name, label) of each of `samples`."""

    def __init__(self, samples: Sequence[tuple[str, int]]):
        self.names = Names(name for name, _ in samples)
        self.targets = np.array([label for _, label in samples], np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.names[index], int(self.targets[index])


def checksum(names: Sequence[str], labels: Iterable[Any] = (), root: str | Path = "") -> str:
    """Of names, those of files below the folder `root` as they are called there, and of their labels, in their order:
    16 letters that others would change."""
    names = names if isinstance(names, Names) else Names(names)
    folder = os.path.join(root, "").encode("utf-8", "surrogatepass") if str(root) else b""
    found = hashlib.sha256(names.text.tobytes().replace(folder, b"") if folder else names.text)
    found.update(",".join(map(str, labels)).encode())
    return found.hexdigest()[:16]
