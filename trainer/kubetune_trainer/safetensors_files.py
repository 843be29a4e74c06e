"""The safetensors format: 8 bytes of length, a JSON header, the numbers. Headers are read here, without torch."""

import json
import struct
from pathlib import Path
from typing import Any, Final

from kubetune_contract.architecture import ModelError
from kubetune_trainer.stored import AGAIN, StoredTensor, read_start

_MAX_HEADER: Final = 100_000_000
"""The format's own limit for a header, in bytes."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor in one file, checked against the file's size. Raises ModelError."""
    header, start = read_start(file, _parse)
    header.pop("__metadata__", None)
    there = file.stat().st_size - start
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != there:
        state = "truncated" if there < end else "damaged"
        raise ModelError(
            f"{file} is {state}: its header promises {end:,} bytes of weights, {there:,} are there; {AGAIN}"
        )
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _parse(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        if length > _MAX_HEADER:
            raise ModelError(f"{file} is damaged: it has no safetensors header; {AGAIN}")
        return json.loads(stream.read(length)), 8 + length
