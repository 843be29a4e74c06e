"""Where a dataset's files come from: a path, or a repository of the Hugging Face Hub."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from kubetune_contract import dataset
from kubetune_trainer.rows import digest_files, find_files
from kubetune_trainer.tokens import Source


class Origin(Protocol):
    """A dataset's files, before they are needed."""

    @property
    def name(self) -> str:
        """What people call it."""

    def digest(self) -> str:
        """Tells contents apart. Raises JobError where there is none."""

    def source(self) -> Source:
        """The files, on this machine."""


@dataclass(frozen=True)
class LocalOrigin:
    """A file or a folder of files."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def digest(self) -> str:
        """Over the content of the files and, in a folder, their order."""
        return _digest(self.path)

    def source(self) -> Source:
        """The files as they are now."""
        files = find_files(self.path)
        return Source(
            self.name, files, ["" if file == self.path else str(file.relative_to(self.path)) for file in files]
        )


def origin_of(source: dataset.Source) -> Origin:
    """Where the rows of a configured dataset come from."""
    assert source.path is not None
    return LocalOrigin(Path(source.path))


def _digest(path: Path) -> str:
    files = find_files(path)
    return _digest_unchanged(tuple((file, *_state(file)) for file in files))


def _state(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return 0, 0  # reading it will tell
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _digest_unchanged(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The run's identity and its data ask for the same digest."""
    return digest_files([file for file, _, _ in files])
