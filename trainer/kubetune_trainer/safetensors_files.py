"""The safetensors format: 8 bytes of length, a JSON header, the numbers. Headers are read here, without torch."""

import json
import math
import struct
from pathlib import Path
from typing import Any, Final

from kubetune_contract.architecture import ModelError
from kubetune_trainer.stored import AGAIN, DTYPES, StoredTensor, read_start

_MAX_HEADER: Final = 100_000_000
"""The format's own limit for a header, in bytes."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor in one file, checked against the file's size. Raises ModelError."""
    header, start = read_start(file, _parse)
    header.pop("__metadata__", None)
    there = file.stat().st_size - start
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != there:
        state = "truncated" if there < end else "damaged"
        raise ModelError(
            f"{file} is {state}: its header promises {end:,} bytes of weights, {there:,} are there; {AGAIN}"
        )
    return tensors


def _tensor(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One entry of the header. Raises ModelError where it is none, or its places do not hold what its shape says."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [first, stop]}:
            sizes = [first, stop - first, *shape] if type(first) is type(stop) is int else [None]
            if all(type(size) is int and size >= 0 for size in sizes) and _fits(dtype, shape, stop - first):
                return StoredTensor(file, dtype, tuple(shape), start + first)
    raise ModelError(f"{file} is damaged: its header has no place, shape and number format for {name!r}; {AGAIN}")


def _fits(dtype: str, shape: list[int], size: int) -> bool:
    """Whether so many bytes hold a tensor of that shape; formats that are not supported are told elsewhere."""
    return dtype not in DTYPES or math.prod(shape) * DTYPES[dtype] == size


def _parse(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, file.stat().st_size - 8):
            raise ModelError(f"{file} is damaged: it has no safetensors header; {AGAIN}")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ModelError(f"{file} is damaged: its header names no tensors; {AGAIN}")
    return header, 8 + length
