"""Whatever can end a run, as an error that says whose it is and what to do. The exit code follows from it."""

import errno
import os
import re
import traceback
from pathlib import Path
from typing import Final

import torch

from kubetune_contract.config import RunConfig
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.fit import NoMemoryError, relief
from kubetune_trainer.distributed import PeerLostError, is_peer_lost

_RUST: Final = re.compile(r"\(os error (\d+)\)")
_NOT_WRITABLE: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}
)
_NO_MEMORY: Final = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate")
_LOG_LINES: Final = 12
"""Last lines of a traceback that the operator is told."""


class OutputError(JobError):
    """The output folder cannot be written."""

    exit_code = ExitCode.OUTPUT_NOT_WRITABLE


class OutputFullError(OutputError):
    """The volume of the output folder has no space left."""

    exit_code = ExitCode.STORAGE_FULL


def as_output_error(error: BaseException, folder: Path) -> OutputError | None:
    """The error as the user's, where it says that files cannot be written."""
    number, where = _errno_of(error), getattr(error, "filename", None) or folder
    if number not in _NOT_WRITABLE:
        return None
    place = f"{where} cannot be written: {getattr(error, 'strerror', None) or os.strerror(number)}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return OutputFullError(
            f"{place}; free some space on that volume or enlarge it, or lower "
            "checkpoint.keep. The checkpoints that are there are whole"
        )
    return OutputError(f"{place}; give user {os.getuid()} the right to write there, or choose another volume or folder")


def _errno_of(error: BaseException) -> int | None:
    """The system's number of the error. safetensors, which is written in Rust, has it in its words alone."""
    if isinstance(error, OSError):
        return error.errno
    found = _RUST.search(str(error))
    return int(found[1]) if found else None


def last_lines(error: Exception) -> str:
    """Where it happened: the end of the traceback."""
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(lines[-_LOG_LINES:])


def as_job_error(error: Exception, config: RunConfig) -> JobError:
    """The error itself where it is a JobError, else the one that it stands for; a crash has its type and words."""
    if isinstance(error, JobError):
        return error
    if (refused := as_output_error(error, Path(config.output_dir))) is not None:
        return refused
    if is_peer_lost(error):
        return PeerLostError(f"another worker is gone, its own log says why: {error}")
    if _is_out_of_memory(error):
        told = str(error).partition(" If reserved but unallocated")[0].rstrip(". ")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return NoMemoryError(
            f"the device's memory is too small: {told or type(error).__name__}: {relief(config, processes)}"
        )
    return JobError(f"{type(error).__name__}: {error}")


def _is_out_of_memory(error: Exception) -> bool:
    """Of a device or of the host. Only torch's allocator has a class of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
