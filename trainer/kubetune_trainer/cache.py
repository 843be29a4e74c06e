"""Where tokenized documents are kept: a folder for each content, complete or absent, made by one process at a time."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Final

from kubetune_contract.dataset import DatasetOptions, RowOptions
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import CACHE_ENV
from kubetune_trainer.formats import TEMPLATES, Formatter
from kubetune_trainer.locks import locked
from kubetune_trainer.sources import Origin
from kubetune_trainer.tokenizer import Tokenizer
from kubetune_trainer.tokens import META_FILE, Tokenized, write_tokenized

_LAYOUT: Final = 1
"""Goes up whenever the same rows become other tokens, or tokens other files."""


class CacheError(JobError):
    """The folder of tokenized data cannot be written."""

    exit_code = ExitCode.OUTPUT_NOT_WRITABLE


class CacheFullError(CacheError):
    """The volume of the tokenized data has no space left."""

    exit_code = ExitCode.STORAGE_FULL


def cache_folder(output: Path) -> Path:
    """$KUBETUNE_CACHE; else ~/.cache/kubetune/tokens, which all runs of a user share; else a folder in the output."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    home = (Path(base) if base else Path.home() / ".cache") / "kubetune" / "tokens"
    return home if _can_write(home) else output / "cache"


def load_tokenized(
    origin: Origin, options: RowOptions, dataset: DatasetOptions, tokenizer: Tokenizer, cache: Path
) -> Tokenized:
    """The rows of one dataset as tokens, made now or earlier. `dataset` has what holds for the whole mixture.

    Raises DataError for files that cannot be read and CacheError where there is no place for the tokens.
    """
    formatter = Formatter(options, dataset.train_on, tokenizer)
    folder = cache / _key(origin, options, dataset, tokenizer)
    if not (folder / META_FILE).exists():
        with _told(folder), locked(folder.with_suffix(".lock"), f"tokenizes {origin.name}") as held:
            if held:
                _remove_left(folder)
            if not (folder / META_FILE).exists():  # whoever had the lock may have done it
                _make(folder, origin, formatter, tokenizer, dataset.max_sequence_length)
    return Tokenized.open(folder)


def _key(origin: Origin, options: RowOptions, dataset: DatasetOptions, tokenizer: Tokenizer) -> str:
    """A digest of all that decides the tokens."""
    template = options.prompt_template
    values = {
        "layout": _LAYOUT,
        "data": origin.digest(),
        "tokenizer": tokenizer.fingerprint,
        "format": options.format,
        "columns": options.columns.to_dict(),
        "template": (TEMPLATES[template.name] if template.name else template).to_dict() if template else None,
        "template_name": template.name if template else None,
        "train_on": dataset.train_on,
        "max_sequence_length": dataset.max_sequence_length,
    }
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _make(folder: Path, origin: Origin, formatter: Formatter, tokenizer: Tokenizer, cut: int) -> None:
    """Writes under another name; the rename makes it complete."""
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)  # others may read what mkdtemp keeps private
        write_tokenized(partial, origin.source(), formatter, tokenizer, cut)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / META_FILE).exists():  # without locks another process may have been faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_left(folder: Path) -> None:
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = CacheFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
        raise kind(
            f"{error.filename or folder.parent} cannot be written: {error.strerror}; tokenized data need 5 bytes a "
            f"token: set {CACHE_ENV} to a folder with rights and space"
        ) from error


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
