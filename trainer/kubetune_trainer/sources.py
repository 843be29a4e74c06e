"""Where a dataset's files come from: a path, or a repository of the Hugging Face Hub."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

from kubetune_contract import dataset
from kubetune_trainer.remote import Repository, Words, hub_errors, literal
from kubetune_trainer.rows import READERS, DataError, digest_files, find_files
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


@dataclass(frozen=True)
class HubOrigin:
    """The files of one split of a dataset repository."""

    repository: Repository
    commit: str
    """The revision as it was when the run began."""
    split: str

    @property
    def name(self) -> str:
        """The repository."""
        return self.repository.name

    def digest(self) -> str:
        """A commit never changes."""
        return f"{self.repository.name} {self.commit} {self.split}"

    def source(self) -> Source:
        """The files, brought into the hub's cache if they are not there. Raises DataError and the hub's errors."""
        from huggingface_hub import HfApi

        with hub_errors(self.repository, _WORDS):
            hub = HfApi()
            listed = hub.list_repo_files(self.name, repo_type="dataset", revision=self.commit)
            names = choose_split(listed, self.split)
            if not names:
                files = ", ".join(name for name in listed if Path(name).suffix in READERS)
                raise DataError(
                    f"{self.repository} has no files of the split {self.split!r}: set dataset.split to the one whose "
                    f"name is in them; its data files are: {files or 'none'}"
                )
            folder = hub.snapshot_download(
                self.name, repo_type="dataset", revision=self.commit, allow_patterns=[literal(name) for name in names]
            )
        return Source(self.name, [Path(folder, name) for name in names], names)


_WORDS: Final = Words(authorize="give {which} in the environment as HF_TOKEN", revision="dataset.revision")

Commits = Mapping[str, str]
"""Of each repository at a revision, as Repository writes it, the commit."""


def pin(sources: Iterable[dataset.Source]) -> dict[str, str]:
    """What the revisions of all repositories are now, so that a run keeps its data when they move on.

    Raises SourceDeniedError and SourceUnavailableError.
    """
    from huggingface_hub import HfApi

    pinned = {}
    for repository in (Repository(source.repo, source.revision) for source in sources if source.repo is not None):
        with hub_errors(repository, _WORDS):
            info = HfApi().dataset_info(repository.name, revision=repository.revision)
        pinned[str(repository)] = info.sha or repository.revision
    return pinned


def origin_of(source: dataset.Source, commits: Commits) -> Origin:
    """Where the rows of a configured dataset come from. A revision that is not pinned is looked up now."""
    if source.repo is None:
        return LocalOrigin(Path(source.path or ""))
    repository = Repository(source.repo, source.revision)
    commit = commits.get(str(repository)) or pin([source])[str(repository)]
    return HubOrigin(repository, commit, source.split)


_SYNONYMS: Final = (("train", "training"), ("validation", "valid", "val", "dev"), ("test", "testing", "eval"))
_SHARD: Final = re.compile(r"(?:.*/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")


def choose_split(names: Sequence[str], split: str) -> list[str]:
    """The data files of a split: those whose path has its name, as a part or before a shard's number.

    Where no path has the name of any split, all of them are `train`.
    """
    files = sorted(name for name in names if Path(name).suffix in READERS and not name.startswith("."))
    known = [word for words in _SYNONYMS for word in words]
    if split == "train" and not any(_SHARD.fullmatch(name) or _belongs(name, word) for name in files for word in known):
        return files
    words = next((group for group in _SYNONYMS if split in group), (split,))
    return [name for name in files if any(_belongs(name, word) for word in words)]


def _belongs(name: str, word: str) -> bool:
    shard = _SHARD.fullmatch(name)
    if shard is not None:
        return shard[1] == word
    return re.search(rf"(?:^|[-._/ ]){re.escape(word)}(?:[-._/ ]|$)", name) is not None


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
