"""Staging: the weights on the models claim are there, whole and a Llama model, before any worker starts.

Runs once per model in a small container of its own, so nothing here imports torch. What was checked is written down in
the manifest `.complete`; as long as the files keep their sizes and times, nothing is downloaded or read again.
"""

import argparse
import errno
import fcntl
import hashlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from kubetune_contract.errors import ConfigError, explain
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import COMPLETE_FILE, MODELS_MOUNT, TERMINATION_LOG
from kubetune_contract.progress import TerminationMessage
from kubetune_contract.staging import StagedFile, StagedModel, StageSource, StagingManifest
from kubetune_trainer.architecture import ARCHITECTURE, ModelError
from kubetune_trainer.hub import check_model, missing_folder

DOWNLOADED: Final = ("*.json", "*.safetensors", "*.jinja", "LICENSE*")
"""Files of a repository that a run or its export uses. Not the same weights in other formats."""

LOCK_FILE: Final = f"{COMPLETE_FILE}.lock"


class SourceDeniedError(JobError):
    """The repository does not exist, or this token may not read it."""

    exit_code = ExitCode.SOURCE_DENIED


class SourceUnavailableError(JobError):
    """The hub cannot be reached or does not work now. What was downloaded stays; a retry goes on from there."""

    exit_code = ExitCode.SOURCE_UNAVAILABLE


class StorageError(JobError):
    """The models claim cannot be written."""

    exit_code = ExitCode.OUTPUT_NOT_WRITABLE


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
    with _storage(folder), _locked(folder):
        known = _known(folder, source)  # whoever had the lock may have done it
        if known is not None:
            return known
        if source.repo is not None:
            _download(source, folder, token)
        return _check(folder, source)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One container at a time: Jobs with different tokens may stage the same repository into the same folder.

    The kernel gives the lock back, also of a killed container. A file system that knows no locks is used without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another container that stages {folder}", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def _known(folder: Path, source: StageSource) -> StagedModel | None:
    """What an earlier run found, if no file has changed since."""
    try:
        manifest = StagingManifest.model_validate_json((folder / COMPLETE_FILE).read_bytes())
        whole = manifest.model.path == source.path and all(_unchanged(folder, file) for file in manifest.files)
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


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    """Errors of the file system become StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "the models claim is full: enlarge it, or delete models that are no longer used"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = (
                f"make the models claim writable for user {os.getuid()}: staging writes downloads and {COMPLETE_FILE}"
            )
        else:
            raise
        raise StorageError(f"{error.filename or folder} cannot be written: {error.strerror}; {remedy}") from error


def _download(source: StageSource, folder: Path, token: str | None) -> None:
    """Fetch the repository's files; those that an earlier run brought are kept, a half one is completed.

    The revision is resolved first: snapshot_download() alone answers with what lies in the folder, however little that
    is, if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    assert source.repo is not None, "there is nothing to download for a path"
    with _hub(source):
        hub = HfApi(token=token)
        commit = hub.model_info(source.repo, revision=source.revision).sha
        print(f"downloading {source.repo} at {source.revision} ({commit})", flush=True)
        hub.snapshot_download(
            source.repo,
            revision=commit,
            local_dir=folder,
            allow_patterns=list(DOWNLOADED),
            ignore_patterns=source.ignore_patterns,
        )


@contextmanager
def _hub(source: StageSource) -> Iterator[None]:
    """Errors of the Hugging Face hub become SourceDeniedError or SourceUnavailableError; OSError of files passes."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client in this hub version

    name = f"{source.repo} at revision {source.revision}"
    try:
        yield
    except errors.HFValidationError as error:
        raise SourceDeniedError(f"{source.repo!r} is no repository of the Hugging Face hub: {error}") from error
    except errors.GatedRepoError as error:
        raise SourceDeniedError(
            f"{name} is gated: accept its terms on the hub with the account of your token, "
            "and name the secret with that token in model.huggingFace.tokenSecretRef"
        ) from error
    except errors.RevisionNotFoundError as error:
        text = f"{source.repo} has no revision {source.revision}: correct model.huggingFace.revision"
        raise SourceDeniedError(text) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(name, error.response.status_code, error) from error
    except (HTTPError, errors.LocalEntryNotFoundError, errors.XetDownloadError, ConnectionError, TimeoutError) as error:
        raise SourceUnavailableError(f"the hub cannot be reached for {name}: {error.__cause__ or error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # The hub's own: a file without its metadata, or one that ended too early.
        raise SourceUnavailableError(f"the download of {name} failed: {error}") from error


def _refusal(name: str, status: int, error: Exception) -> JobError:
    if status in (401, 403, 404):
        return SourceDeniedError(
            f"{name} does not exist or this token may not read it (HTTP {status}): check the name, "
            "and name a secret with a token that may in model.huggingFace.tokenSecretRef"
        )
    return SourceUnavailableError(f"the hub does not serve {name} now (HTTP {status}): {error}")
