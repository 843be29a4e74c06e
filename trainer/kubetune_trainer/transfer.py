"""Files from elsewhere into a folder: each is whole or absent, what an earlier try has brought is kept, and what lies
there is only believed if its digest says so. Where the bytes come from is the source's business.

Nothing here imports torch.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

from kubetune_contract.dataset import stays_inside
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_trainer.remote import SourceDeniedError, SourceUnavailableError, Words

PARTIAL: Final = ".cache/kubetune"
"""Folder of half files, in the folder of the whole ones."""

PARALLEL: Final = 8
"""Files on their way at once, as in huggingface_hub."""

_CHUNK: Final = 1 << 20


class StorageError(JobError):
    """The folder cannot be written."""

    exit_code = ExitCode.OUTPUT_NOT_WRITABLE


class StorageFullError(StorageError):
    """There is not enough room for the files."""

    exit_code = ExitCode.STORAGE_FULL


@dataclass(frozen=True)
class Digest:
    """What the content of a file must add up to."""

    kind: Literal["sha256", "git", "md5"]
    """git: SHA-1 over a header and the content, as git names a blob."""
    value: str
    """Hexadecimal."""
    part: int = 0
    """md5: bytes of a part where the value is the digest of the parts' digests; 0 where it is that of the content."""

    def fits(self, file: Path) -> bool:
        """Whether the file has this digest. It is read whole."""
        with file.open("rb") as stream:
            if self.kind == "git":
                header = f"blob {file.stat().st_size}\0".encode()
                return _over(stream, hashlib.sha1(header, usedforsecurity=False)) == self.value
            if not self.part:
                return _over(stream, hashlib.new(self.kind, usedforsecurity=False)) == self.value
            parts = hashlib.md5(usedforsecurity=False)
            while (piece := hashlib.md5(usedforsecurity=False)) and _take(stream, self.part, piece.update):
                parts.update(piece.digest())
            return parts.hexdigest() == self.value


def _over(stream: BinaryIO, digest: "hashlib._Hash") -> str:
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _take(stream: BinaryIO, size: int, update: Callable[[bytes], object]) -> int:
    """Gives the next `size` bytes to `update`; returns how many there were."""
    left = size
    while left and (chunk := stream.read(min(left, _CHUNK))):
        update(chunk)
        left -= len(chunk)
    return size - left


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be brought."""

    path: str
    """Where it belongs, relative to the folder."""
    size: int
    """Bytes."""
    version: str
    """Tells its contents apart: half files of another one are not continued."""
    digest: Digest | None
    """None where the source knows none: then only the size is checked."""
    bring: Callable[[BinaryIO, int], None]
    """Appends the content from that byte on to the stream. Raises JobError."""
    place: Callable[[], None] | None = None
    """Puts the whole file into the folder, where the source can do it in no other way. Raises JobError."""

    @property
    def half(self) -> str:
        """Name of the half file."""
        return hashlib.sha256(f"{self.path}\0{self.version}".encode()).hexdigest()

    def lies_in(self, folder: Path) -> bool:
        """Whether the folder has the file, whole."""
        target = folder / self.path
        if not target.is_file() or target.stat().st_size != self.size:
            return False
        return self.digest is None or self.digest.fits(target)


def transfer(files: Sequence[RemoteFile], folder: Path, words: Words) -> None:
    """Make sure that all files lie in the folder. Raises JobError, or OSError of the file system.

    Files that are there and whole are kept; one that is damaged is brought again.
    """
    keep_inside(file.path for file in files)
    with ThreadPoolExecutor(PARALLEL) as pool:
        whole = list(pool.map(lambda file: file.lies_in(folder), files))
        missing = [file for file, there in zip(files, whole, strict=True) if not there]
        for file in missing:
            if (folder / file.path).exists():
                print(f"{file.path} is damaged, or of another version: it is brought again", flush=True)
                (folder / file.path).unlink()
        _check_room(missing, folder, words)
        list(pool.map(lambda file: _complete(file, folder), missing))
    for file in files:
        if file.digest is None:
            print(f"the source has no digest of {file.path}: only its size is checked", flush=True)


def keep_inside(paths: Iterable[str]) -> None:
    """Raises SourceDeniedError for a path that leads out of the folder: whoever fills a bucket names its objects."""
    for path in paths:
        if not stays_inside(path):
            raise SourceDeniedError(f"the source has a file {path!r}, which would lie outside the folder")


def clear(folder: Path) -> None:
    """Remove half files that nobody will continue."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def _check_room(missing: Sequence[RemoteFile], folder: Path, words: Words) -> None:
    halves = {file.half: _size(folder / PARTIAL / file.half) for file in missing}
    needed = sum(max(0, file.size - halves[file.half]) for file in missing)
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if needed > free:
        raise StorageFullError(
            f"{folder}: {needed:,} bytes ({needed / 1e9:.2f} GB) are still to be downloaded, but only {free:,} "
            f"({free / 1e9:.2f} GB) are free; {words.full}"
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _complete(file: RemoteFile, folder: Path) -> None:
    """Bring one file, going on behind the bytes that an earlier call has left."""
    target, half = folder / file.path, folder / PARTIAL / file.half
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.place is not None:
        file.place()
        _verify(file, target)
        return
    half.parent.mkdir(parents=True, exist_ok=True)
    with half.open("ab") as stream:
        _lock(stream)  # another command may bring the same; the kernel frees a dead one's lock
        if file.lies_in(folder):
            half.unlink(missing_ok=True)
            return
        there = stream.seek(0, os.SEEK_END)  # whoever had the lock may have gone on
        if there > file.size:
            there = stream.truncate(0)
        if there:
            print(f"{file.path}: going on behind {there:,} of {file.size:,} bytes", flush=True)
        if there < file.size:
            file.bring(stream, there)
        stream.flush()
        os.fsync(stream.fileno())
        _verify(file, half)
        half.replace(target)


def _verify(file: RemoteFile, path: Path) -> None:
    size = path.stat().st_size
    if size != file.size:
        raise SourceUnavailableError(f"{file.path} ended after {size:,} of {file.size:,} bytes; a retry goes on there")
    if file.digest is not None and not file.digest.fits(path):
        path.unlink()
        raise SourceUnavailableError(
            f"{file.path} has arrived with another content than the source has told "
            f"({file.digest.kind} {file.digest.value}); a retry brings it again"
        )


def _lock(stream: BinaryIO) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:  # a file system that knows no locks is used without
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


@contextmanager
def storage(folder: Path, words: Words) -> Iterator[None]:
    """Errors of the file system become StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename or folder} cannot be written: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"{place}; {words.full}") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(f"{place}; {words.read_only}") from error
        raise
