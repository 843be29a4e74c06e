"""CRC-32 sums of what a checkpoint holds: a disk or a network that changes a bit is found before it is resumed from."""

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

SUMS: Final = ".sums"
"""How a file with the sums of what one process has written ends; rank 0 puts them into the manifest."""


def sum_of(manifest: dict[str, Any]) -> int:
    """CRC-32 of a manifest, whatever the order of its keys."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def file_sum(path: Path) -> int | None:
    """CRC-32 of a file; None for one that cannot be read."""
    total = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total = zlib.crc32(chunk, total)
    except OSError:
        return None
    return total


def summing_writer(folder: Path) -> "FileSystemWriter":
    """A writer that leaves, beside what this process writes, the checksums of it, before rank 0 goes on."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import WriteResult
    from torch.futures import Future

    class Summing(FileSystemWriter):
        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
            done = super().write_data(plan, planner)
            names = {result.storage_data.relative_path for result in done.value()}
            sums = {name: file_sum(folder / name) for name in sorted(names)}
            (folder / f"{plan.storage_data.prefix}{SUMS}").write_text(json.dumps(sums))
            return done

    return Summing(folder)
