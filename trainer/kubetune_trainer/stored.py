"""Tensors as they lie in files, and how their rows are read. Importing this module does not import torch.

Rows are read into fresh memory, not mapped: mapped pages would stay beside the copy and double what loading takes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from kubetune_contract.architecture import ModelError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

DTYPES: Final = {"F32": 4, "BF16": 2, "F16": 2}
"""safetensors' names of the supported number formats, with their bytes."""

AGAIN: Final = "copy or download it again"


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file, little-endian."""

    file: Path
    dtype: str
    """safetensors' name, such as `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    checksum: int | None = None
    """The same for equal contents, where the file's format has one."""

    def read_rows(self, start: int, into: "Tensor") -> None:
        """Fill the contiguous tensor `into` with the rows from `start` on."""
        import torch

        row = math.prod(self.shape[1:]) * DTYPES[self.dtype]
        rest = into.flatten().view(torch.uint8).numpy().data
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * row)
            while rest:
                count = stream.readinto(rest)  # Linux gives at most 2 GB at once
                if not count:
                    raise ModelError(f"{self.file} has become shorter while it was read; {AGAIN}")
                rest = rest[count:]


@dataclass(frozen=True)
class Weight:
    """A weight in one part, or in the parts that the ranks of Meta's model-parallel group had."""

    parts: tuple[StoredTensor, ...]
    axis: int = 0
    """The dimension along which the parts are put together."""
    interleaved: int = 0
    """Size of a head whose rows are in Meta's order for RoPE: 0, E/2, 1, E/2 + 1 ... They are read in ours: 0, 1, 2 ...

    0: the rows are in our order.
    """

    @property
    def dtype(self) -> str:
        """safetensors' name of the number format."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def rows(self, start: int, stop: int) -> "Tensor":
        """Rows start to stop, in the file's dtype. Only they are read, of interleaved heads those that they touch."""
        stop = min(stop, self.shape[0])
        if not self.interleaved:
            return self._stored_rows(start, stop)
        size = self.interleaved
        first, last = start // size * size, -(-stop // size) * size
        block = self._stored_rows(first, last)
        pairs = block.view(-1, size // 2, 2, *self.shape[1:])
        return pairs.transpose(1, 2).reshape(block.shape)[start - first : stop - first]

    def _stored_rows(self, start: int, stop: int) -> "Tensor":
        import torch

        formats = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=formats[self.dtype])
        ends = list(accumulate(part.shape[self.axis] for part in self.parts))
        for part, end in zip(self.parts, ends, strict=True):
            begin = end - part.shape[self.axis]
            if self.axis:
                columns = torch.empty((stop - start, end - begin), dtype=rows.dtype)
                part.read_rows(start, columns)
                rows[:, begin:end] = columns
            elif (low := max(start, begin)) < (high := min(stop, end)):
                part.read_rows(low - begin, rows[low - start : high - start])
        return rows


def read_start(file: Path, parse: Callable[[Path], T]) -> T:
    """`parse(file)`; a file that is missing, unreadable or only points to the weights becomes a ModelError."""
    try:
        with file.open("rb") as stream:
            if stream.read(8) == b"version ":
                raise ModelError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` and copy it again")
        return parse(file)
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing; {AGAIN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}; {AGAIN}") from error
