"""A batch as one tensor, on its way from the process that has loaded it.

For each tensor that a loading process sends the training process asks it for memory, one tensor after the other, and
the answer waits for Python's lock there, some 5 ms while it decodes; then it makes a copy in page-locked memory.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmamba_kernels.private import shared_bytes

# Of the bytes a tensor's first, and the one behind its last; its type and shape.
Part = tuple[int, int, torch.dtype, torch.Size]

_ALIGNED = 64  # bytes: so that each tensor begins where any type may


@dataclass(frozen=True)
class Packed:
    """Of an object of any kind the tensors, one behind the other, in `data` (bytes,) uint8, and the rest pickled."""

    data: Tensor
    rest: bytes

    def pin_memory(self) -> "Packed":
        """What DataLoader calls."""
        return Packed(self.data.pin_memory(), self.rest)

    def unpack(self) -> Any:
        """The object, its tensors being parts of `data`."""
        unpickler = pickle.Unpickler(io.BytesIO(self.rest))
        unpickler.persistent_load = self.part
        return unpickler.load()

    def part(self, part: Part) -> Tensor:
        start, end, dtype, shape = part
        return self.data[start:end].view(dtype).view(shape)


def pack(batch: Any) -> Packed:
    """`batch` in memory that processes share."""
    parts: list[tuple[Tensor, Part]] = []

    def part(value: Any) -> Part | None:
        if not isinstance(value, Tensor):
            return None
        start = -(-parts[-1][1][1] // _ALIGNED) * _ALIGNED if parts else 0
        parts.append((value, (start, start + value.nbytes, value.dtype, value.shape)))
        return parts[-1][1]

    rest = io.BytesIO()
    pickler = pickle.Pickler(rest)
    pickler.persistent_id = part
    pickler.dump(batch)
    packed = Packed(shared_bytes(parts[-1][1][1] if parts else 0), rest.getvalue())
    for tensor, place in parts:
        packed.part(place).copy_(tensor)
    return packed
