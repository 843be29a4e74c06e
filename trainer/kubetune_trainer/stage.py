"""Staging: what a run reads from the models claim is there and whole before any worker starts.

Runs once per model or dataset in a small container of its own, so nothing here imports torch. What was checked is
written down in the manifest `.complete`. As long as the files keep their sizes and times nothing is downloaded or read
again, until the last look at all digests is too old. What was downloaded and is damaged is downloaded again.
"""

import argparse
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from kubetune_contract.architecture import ARCHITECTURE, ModelError
from kubetune_contract.errors import ConfigError, explain
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import COMPLETE_FILE, MODELS_MOUNT, TERMINATION_LOG
from kubetune_contract.progress import TerminationMessage
from kubetune_contract.staging import StagedData, StagedFile, StagedModel, StageSource, StagingManifest
from kubetune_trainer.bucket import Bucket
from kubetune_trainer.download import choose_files, fetch, fetch_bucket, fetch_data, files_at
from kubetune_trainer.hub import check_model, missing_folder
from kubetune_trainer.locks import locked
from kubetune_trainer.remote import Repository, Words
from kubetune_trainer.rows import DataError, find_files
from kubetune_trainer.transfer import clear, storage

LOCK_FILE: Final = f"{COMPLETE_FILE}.lock"


def _words(source: StageSource) -> Words:
    """Fields as the manifest of the job has them. A dataset may stand in several places of it."""
    kind, secret = ("s3", "credentialsSecretRef") if source.uri is not None else ("huggingFace", "tokenSecretRef")

    def field(name: str) -> str:
        return f"model.{kind}.{name}" if source.content == "Model" else f"{kind}.{name} of this dataset"

    return Words(
        authorize=f"name a secret with {{which}} in {field(secret)}",
        revision=field("revision"),
        place=field("uri"),
        region=field("region"),
        full="enlarge the models claim, or delete models that are no longer used",
        read_only=f"make the models claim writable for user {os.getuid()}: "
        f"staging writes downloads and {COMPLETE_FILE}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Stage what `--source` describes. Returns the exit code; says it in the termination message too."""
    parser = argparse.ArgumentParser(prog="python -m kubetune_trainer stage", description=__doc__)
    parser.add_argument("--source", required=True, help="a StageSource as JSON")
    parser.add_argument("--root", type=Path, default=Path(MODELS_MOUNT), help="where the models claim is mounted")
    parser.add_argument("--termination-log", type=Path, default=Path(TERMINATION_LOG), help="the kubelet's file")
    options = parser.parse_args(arguments)
    try:
        message = _done(stage(_parse(options.source), options.root, os.environ))
        code = ExitCode.DONE
    except JobError as error:
        code = error.exit_code
        message = TerminationMessage(reason=code.reason, message=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the container must say it
        traceback.print_exc()
        code = ExitCode.CRASH
        message = TerminationMessage(reason=code.reason, message=f"{type(error).__name__}: {error}")
    print(message.message, file=sys.stderr if code else sys.stdout, flush=True)
    if options.termination_log.exists():
        options.termination_log.write_text(message.fitted().to_json())
    return code


def _done(staged: StagedModel | StagedData) -> TerminationMessage:
    reason, size = ExitCode.DONE.reason, f"{staged.bytes / 1e9:.2f} GB"
    if isinstance(staged, StagedModel):
        text = f"{staged.path} is ready: {staged.parameters:,} parameters, {size}"
        return TerminationMessage(reason=reason, message=text, staged=staged)
    text = f"{staged.path} is ready: {staged.files} file{'s' if staged.files > 1 else ''}, {size}"
    return TerminationMessage(reason=reason, message=text, staged_data=staged)


def _parse(text: str) -> StageSource:
    try:
        return StageSource.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(explain(error, StageSource)) from error


def stage(source: StageSource, root: Path, environment: Mapping[str, str] | None = None) -> StagedModel | StagedData:
    """Make sure that the files lie whole under `root`, and write their manifest. Raises JobError.

    `environment` holds what opens closed sources: HF_TOKEN, or the AWS_ variables of a bucket.
    """
    folder, words = root / source.path, _words(source)
    known = _known(folder, source)
    if known is not None:
        return known
    if _is_local(source) and not folder.is_dir():
        raise ModelError(missing_folder(folder))
    with storage(folder, words), locked(folder / LOCK_FILE, f"stages {folder}"):
        known = _known(folder, source)  # whoever had the lock may have done it
        if known is not None:
            return known
        before = _manifest(folder)
        if _is_local(source):
            _refuse_damage(folder, before)
            return _check(folder, source, None)
        commit = _download(source, folder, before, environment or {})
        clear(folder)
        return _check(folder, source, commit)


def _is_local(source: StageSource) -> bool:
    return source.repo is None and source.uri is None


def _download(
    source: StageSource, folder: Path, before: StagingManifest | None, environment: Mapping[str, str]
) -> str | None:
    """Bring the files. Those of a repository stay at the commit to which the revision led the first time."""
    words, ignored = _words(source), tuple(source.ignore_patterns)
    if source.uri is not None:
        bucket = Bucket(source.uri, source.endpoint, source.region)
        fetch_bucket(bucket, folder, environment, words, _chooser(source))
        return None
    pinned = before.staged.revision if before is not None else None
    repository = Repository(source.repo or "", pinned or source.revision, ignored)
    token = environment.get("HF_TOKEN")
    if source.content == "Model":
        return fetch(repository, folder, token, words)
    return fetch_data(repository, folder, token, words, path=source.file, split=source.split)


def _chooser(source: StageSource) -> Callable[[Sequence[str]], list[str]]:
    """Which objects of a bucket are wanted. Raises ModelError or DataError where none is."""

    def choose(names: Sequence[str]) -> list[str]:
        if source.content == "Model":
            found = choose_files(names, source.ignore_patterns)
        else:
            found = files_at(None, [n for n in names if not any(fnmatch(n, p) for p in source.ignore_patterns)])
        if found:
            return found
        shown = ", ".join(sorted(names)[:10]) + (" and more" if len(names) > 10 else "")
        if source.content == "Model":
            raise ModelError(f"{source.uri} has no file of a model that is not ignored; it holds {shown}")
        raise DataError(f"{source.uri} has no data files that are not ignored; it holds {shown}")

    return choose


# --- what an earlier run has found ------------------------------------------------------------------------------------


def _manifest(folder: Path) -> StagingManifest | None:
    try:
        return StagingManifest.model_validate_json((folder / COMPLETE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _known(folder: Path, source: StageSource) -> StagedModel | StagedData | None:
    """What an earlier run found, if no file has changed since and the last look at their content is not too old."""
    manifest = _manifest(folder)
    if manifest is None or manifest.staged.path != source.path:
        return None
    if not all(_unchanged(folder, file) for file in manifest.files):
        return None
    age = time.time() - (folder / COMPLETE_FILE).stat().st_mtime
    if age <= source.trusted_seconds:
        return manifest.staged
    if any(file.sha256 != _sha256(folder / file.path) for file in manifest.files):
        return None
    try:
        os.utime(folder / COMPLETE_FILE)
    except OSError as error:
        print(f"the date of the check cannot be written down ({error.strerror}): the next job checks again", flush=True)
    return manifest.staged


def _unchanged(folder: Path, file: StagedFile) -> bool:
    try:
        status = (folder / file.path).stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size, file.modified)


def _refuse_damage(folder: Path, manifest: StagingManifest | None) -> None:
    """Files that somebody put there and replaced have new times. Others than the content has changed: no hand did it.

    Raises ModelError.
    """
    for file in manifest.files if manifest is not None else ():
        if _unchanged(folder, file) and file.sha256 != _sha256(folder / file.path):
            checked = datetime.fromtimestamp((folder / COMPLETE_FILE).stat().st_mtime, UTC)
            raise ModelError(
                f"{folder / file.path} is damaged: its content has changed since {checked:%Y-%m-%d %H:%M} UTC, but "
                "neither its size nor its time has; copy it again, or `touch` it if the change is meant"
            )


# --- what is there now ------------------------------------------------------------------------------------------------


def _check(folder: Path, source: StageSource, commit: str | None) -> StagedModel | StagedData:
    """Check the files, then write the manifest. Its place is taken first: digests of large files take long."""
    model = check_model(folder) if source.content == "Model" else None
    names = model.files() if model else [str(file.relative_to(folder)) for file in find_files(folder)]
    scratch = folder / f"{COMPLETE_FILE}.partial"
    with scratch.open("w") as stream:
        files = [_digest(folder, name) for name in names]
        size = sum(file.size for file in files)
        if model is not None:
            config = model.config()
            staged = StagedModel(
                path=source.path,
                architecture=ARCHITECTURE,
                parameters=config.parameters,
                bytes=size,
                revision=commit,
                sizes=config.sizes,
            )
            manifest = StagingManifest(model=staged, files=files)
        else:
            data = StagedData(path=source.path, files=len(files), bytes=size, revision=commit)
            manifest = StagingManifest(data=data, files=files)
        stream.write(manifest.to_json(indent=2))
        stream.flush()
        os.fsync(stream.fileno())
    scratch.rename(folder / COMPLETE_FILE)
    return manifest.staged


def _digest(folder: Path, name: str) -> StagedFile:
    path = folder / name
    status = path.stat()
    digest = _sha256(path)
    print(f"checked {name}, {status.st_size:,} bytes", flush=True)
    return StagedFile(path=name, size=status.st_size, modified=status.st_mtime_ns, sha256=digest)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
