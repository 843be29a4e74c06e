"""Weights from the Hugging Face hub: what staging and `tune download` share, and that command itself.

Nothing here imports torch.
"""

import argparse
import errno
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from kubetune_contract.architecture import ModelError
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_trainer.hub import check_model
from kubetune_trainer.remote import Repository, SourceDeniedError, Words, hub_errors, literal

_USED: Final = ("*.json", "*.safetensors", "*.pth", "*tokenizer.model", "*.jinja", "LICENSE*", "USE_POLICY*")
"""Files of a repository that a run or its export uses, and the terms of their use."""

_META: Final = ("consolidated*", "original/*")
"""Meta's own files. A repository with safetensors files has the same weights in them a second time."""

_PARTIAL: Final = ".cache/kubetune"
"""Folder of half files, in the model's folder; each is named by the digest of the whole."""

_PARALLEL: Final = 8
"""Large files on their way at once, as in huggingface_hub."""

_TOKEN_OPTION: Final = "--hf-token"  # noqa: S105 - its name
_TOKEN_VARIABLE: Final = "HF_TOKEN"  # noqa: S105 - its name
_INTERRUPTED: Final = 130
"""What a shell reports for a command that Ctrl-C ended."""


class StorageError(JobError):
    """The folder of the model cannot be written."""

    exit_code = ExitCode.OUTPUT_NOT_WRITABLE


def fetch(source: Repository, folder: Path, token: str | None, words: Words) -> None:
    """Download the files of `source` that a run uses into `folder`. Raises JobError, or OSError of the files.

    What an earlier call brought is kept, a half file is completed. The revision is resolved first: snapshot_download()
    alone answers with what lies in the folder, however little that is, if the hub cannot be reached or refuses. It also
    begins a half file anew, so the large ones are brought before; it then compares their digests with the hub's.
    """
    from huggingface_hub import HfApi

    with hub_errors(source, words):
        hub = HfApi(token=token)
        info = hub.model_info(source.name, revision=source.revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or ()}
        wanted = choose_files(list(files), source.ignore_patterns)
        print(f"downloading {source.name} at {source.revision} ({info.sha}): {len(wanted)} files", flush=True)
        if not wanted:
            raise SourceDeniedError(f"{source} has no file of a model that is not ignored; check the ignored patterns")
        large = [files[name] for name in wanted if files[name].lfs and not (folder / name).exists()]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(lambda file: _complete(source, info.sha, file, folder, token), large))
        hub.snapshot_download(
            source.name, revision=info.sha, local_dir=folder, allow_patterns=[literal(name) for name in wanted]
        )


def _complete(source: Repository, commit: str | None, file: Any, folder: Path, token: str | None) -> None:
    """Bring one large file, going on behind the bytes that an earlier call has left. `file`: a RepoSibling."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # only snapshot_download() can
    target, partial = folder / file.rfilename, folder / _PARTIAL / file.lfs.sha256
    for path in (target, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # another command may fetch the same; the kernel frees a dead one's lock
        if target.exists():
            partial.unlink(missing_ok=True)
            return
        there = stream.tell()
        if there > file.size:
            there = stream.truncate(0)
        url = hf_hub_url(source.name, file.rfilename, revision=commit)
        headers = build_hf_headers(token=token)
        http_get(url, stream, resume_size=there, headers=headers, expected_size=file.size)
        stream.flush()
        partial.replace(target)


def choose_files(names: Sequence[str], ignore_patterns: Sequence[str]) -> list[str]:
    """Those files that a run uses. The weights come in one format: safetensors; Meta's where there are no others."""
    wanted = [name for name in names if _matches(name, _USED) and not _matches(name, ignore_patterns)]
    if any(name.endswith(".safetensors") and "/" not in name for name in wanted):
        return [name for name in wanted if not _matches(name, _META)]
    return wanted


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any pattern fits, as huggingface_hub reads patterns: `*` goes over slashes, `x/` is all of a folder."""
    return any(fnmatch(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)


@contextmanager
def storage(folder: Path, words: Words) -> Iterator[None]:
    """Errors of the file system become StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = words.full
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = words.read_only
        else:
            raise
        raise StorageError(f"{error.filename or folder} cannot be written: {error.strerror}; {remedy}") from error


# --- tune download ----------------------------------------------------------------------------------------------------

_WORDS: Final = Words(
    authorize=f"give {{which}} with {_TOKEN_OPTION} or in the environment as {_TOKEN_VARIABLE}",
    revision="--revision",
    full="the disk is full: make room, or give another --output-dir; the same command then goes on where it stopped",
    read_only="make the folder writable, or give another --output-dir",
)


def add_parser(commands: Any) -> None:
    """Add `download` to the subcommands of `tune`; its `run` returns the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "download",
        help="fetch a model from the Hugging Face hub",
        description="Fetch a model from the Hugging Face hub. Interrupted, the same command goes on where it stopped.",
    )
    parser.add_argument("repo", metavar="REPO", help="such as meta-llama/Meta-Llama-3-8B-Instruct")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help=f"where to ({tempfile.gettempdir()}/NAME-OF-THE-MODEL)"
    )
    parser.add_argument(
        _TOKEN_OPTION,
        metavar="TOKEN",
        help=f"opens gated repositories; better given in the environment as {_TOKEN_VARIABLE}: "
        "shells keep what is typed",
    )
    parser.add_argument(
        "--ignore-patterns",
        nargs="*",
        default=[],
        metavar="PATTERN",
        help="files that are not fetched. Weights come in one format in any case: original/consolidated* is left out "
        'if there are safetensors files; "*.safetensors" here fetches Meta\'s files instead. '
        "Formats that cannot be trained (.bin, .gguf, ...) are never fetched",
    )
    parser.add_argument("--revision", default="main", metavar="R", help="branch, tag or commit (main)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`tune download`. Returns the exit code; errors go to stderr."""
    if options.hf_token:
        _hide_token(options.hf_token)
    folder = options.output_dir or Path(tempfile.gettempdir(), options.repo.rpartition("/")[2])
    source = Repository(options.repo, options.revision, tuple(options.ignore_patterns))
    try:
        with storage(folder, _WORDS):
            folder.mkdir(parents=True, exist_ok=True)
            fetch(source, folder, os.environ.get(_TOKEN_VARIABLE) or None, _WORDS)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return _INTERRUPTED
    print(_verdict(folder))
    return ExitCode.DONE


def _verdict(folder: Path) -> str:
    """What came: a download of something that cannot be trained has succeeded all the same."""
    try:
        reader = check_model(folder)
    except ModelError as error:
        return f"the files are in {folder}. They cannot be trained as they are: {error}"
    size = sum((folder / name).stat().st_size for name in reader.files())
    return f"{folder} is ready: {reader.config().parameters:,} parameters, {size / 1e9:.2f} GB"


def _hide_token(token: str) -> None:
    """Everybody on a machine can read the arguments of a process: start again with the token in the environment."""
    os.environ[_TOKEN_VARIABLE] = token
    arguments = without_token(sys.orig_argv)
    if arguments != sys.orig_argv:
        os.execv(sys.executable, [sys.executable, *arguments[1:]])  # noqa: S606 - this very program


def without_token(arguments: Sequence[str]) -> list[str]:
    """A command line without the option that gives the token, however it was shortened."""
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        option, equals, _ = word.partition("=")
        if len(option) > len("--") and _TOKEN_OPTION.startswith(option):
            if not equals:
                next(rest, None)
        else:
            kept.append(word)
    return kept
