"""Staging: the weights on the models claim are there, whole and a Llama model, before any worker starts.

Runs once per model in a small container of its own, so nothing here imports torch. What was checked is written down in
the manifest `.complete`; as long as the files keep their sizes and times, nothing is downloaded or read again.
"""

import argparse
import hashlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from kubetune_contract.architecture import ARCHITECTURE, ModelError
from kubetune_contract.errors import ConfigError, explain
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import COMPLETE_FILE, MODELS_MOUNT, TERMINATION_LOG
from kubetune_contract.progress import TerminationMessage
from kubetune_contract.staging import StagedFile, StagedModel, StageSource, StagingManifest
from kubetune_trainer.download import fetch, storage
from kubetune_trainer.hub import check_model, missing_folder
from kubetune_trainer.locks import locked
from kubetune_trainer.remote import Repository, Words

LOCK_FILE: Final = f"{COMPLETE_FILE}.lock"


_WORDS: Final = Words(
    authorize="name a secret with {which} in model.huggingFace.tokenSecretRef",
    revision="model.huggingFace.revision",
    full="the models claim is full: enlarge it, or delete models that are no longer used",
    read_only=f"make the models claim writable for user {os.getuid()}: staging writes downloads and {COMPLETE_FILE}",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Stage the model that `--source` describes. Returns the exit code; says it in the termination message too."""
    parser = argparse.ArgumentParser(prog="python -m kubetune_trainer stage", description=__doc__)
    parser.add_argument("--source", required=True, help="a StageSource as JSON")
    parser.add_argument("--root", type=Path, default=Path(MODELS_MOUNT), help="where the models claim is mounted")
    parser.add_argument("--termination-log", type=Path, default=Path(TERMINATION_LOG), help="the kubelet's file")
    options = parser.parse_args(arguments)
    try:
        staged = stage(_parse(options.source), options.root, os.environ.get("HF_TOKEN"))
        text = f"{staged.path} is ready: {staged.parameters:,} parameters, {staged.bytes / 1e9:.2f} GB"
        message = TerminationMessage(reason=ExitCode.DONE.reason, message=text, staged=staged)
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


def _parse(text: str) -> StageSource:
    try:
        return StageSource.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(explain(error, StageSource)) from error


def stage(source: StageSource, root: Path, token: str | None = None) -> StagedModel:
    """Make sure that the model lies whole under `root`, and write its manifest. Raises JobError.

    `token` opens private and gated repositories.
    """
    folder = root / source.path
    known = _known(folder, source)
    if known is not None:
        return known
    if source.repo is None and not folder.is_dir():
        raise ModelError(missing_folder(folder))
    with storage(folder, _WORDS), locked(folder / LOCK_FILE, f"stages {folder}"):
        known = _known(folder, source)  # whoever had the lock may have done it
        if known is not None:
            return known
        if source.repo is not None:
            repository = Repository(source.repo, source.revision, tuple(source.ignore_patterns))
            fetch(repository, folder, token, _WORDS)
        return _check(folder, source)


def _known(folder: Path, source: StageSource) -> StagedModel | None:
    """What an earlier run found, if no file has changed since."""
    try:
        manifest = StagingManifest.model_validate_json((folder / COMPLETE_FILE).read_bytes())
        whole = manifest.staged.path == source.path and all(_unchanged(folder, file) for file in manifest.files)
    except (OSError, ValidationError):
        return None
    return manifest.model if whole else None


def _unchanged(folder: Path, file: StagedFile) -> bool:
    status = (folder / file.path).stat()
    return (status.st_size, status.st_mtime_ns) == (file.size, file.modified)


def _check(folder: Path, source: StageSource) -> StagedModel:
    """Check the files, then write the manifest. Its place is taken first: digests of large files take long."""
    reader = check_model(folder)
    scratch = folder / f"{COMPLETE_FILE}.partial"
    with scratch.open("w") as stream:
        files = [_digest(folder, name) for name in reader.files()]
        staged = StagedModel(
            path=source.path,
            architecture=ARCHITECTURE,
            parameters=reader.config().parameters,
            bytes=sum(file.size for file in files),
        )
        stream.write(StagingManifest(model=staged, files=files).to_json(indent=2))
        stream.flush()
        os.fsync(stream.fileno())
    scratch.rename(folder / COMPLETE_FILE)
    return staged


def _digest(folder: Path, name: str) -> StagedFile:
    path = folder / name
    status = path.stat()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    print(f"checked {name}, {status.st_size:,} bytes", flush=True)
    return StagedFile(path=name, size=status.st_size, modified=status.st_mtime_ns, sha256=digest)
