"""Models and data from the Hugging Face hub and from buckets: what staging and `tune download` share, and that command.

Nothing here imports torch.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

from kubetune_contract.architecture import ModelError
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_trainer.bucket import Bucket, BucketReader
from kubetune_trainer.hub import check_model
from kubetune_trainer.remote import Repository, SourceDeniedError, Words, hub_errors
from kubetune_trainer.rows import READERS, DataError
from kubetune_trainer.sources import choose_split
from kubetune_trainer.transfer import Digest, RemoteFile, clear, keep_inside, storage, transfer

_USED: Final = ("*.json", "*.safetensors", "*.pth", "*tokenizer.model", "*.jinja", "LICENSE*", "USE_POLICY*")
"""Files of a repository that a run or its export uses, and the terms of their use."""

_META: Final = ("consolidated*", "original/*")
"""Meta's own files. A repository with safetensors files has the same weights in them a second time."""

_TOKEN_OPTION: Final = "--hf-token"  # noqa: S105 - its name
_TOKEN_VARIABLE: Final = "HF_TOKEN"  # noqa: S105 - its name
_INTERRUPTED: Final = 130
"""What a shell reports for a command that Ctrl-C ended."""


def fetch(source: Repository, folder: Path, token: str | None, words: Words) -> str:
    """Download the files of a model that a run uses; returns the commit. Raises JobError, or OSError of the files."""
    return _fetch(source, folder, token, words, lambda names: choose_files(names, source.ignore_patterns))


def fetch_data(
    source: Repository, folder: Path, token: str | None, words: Words, *, path: str | None, split: str | None
) -> str:
    """Download the data files at a path of a dataset repository, or those of a split; returns the commit.

    Raises JobError, or OSError of the files.
    """

    def choose(names: Sequence[str]) -> list[str]:
        left = [name for name in names if not _matches(name, source.ignore_patterns)]
        found = choose_split(left, split or "train") if path is None else files_at(path, left)
        if not found:
            sought = f"at {path}" if path is not None else f"of the split {split or 'train'!r}"
            there = [name for name in names if Path(name).suffix in READERS]
            shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
            raise DataError(f"{source} has no data files {sought}; its data files are: {shown or 'none'}")
        return found

    return _fetch(source, folder, token, words, choose, kind="dataset")


def fetch_bucket(
    source: Bucket,
    folder: Path,
    environment: Mapping[str, str],
    words: Words,
    choose: Callable[[Sequence[str]], list[str]],
) -> None:
    """Download those objects of a bucket that `choose` takes of their paths. Raises JobError, or OSError of the files.

    `environment` holds the credentials.
    """
    reader = BucketReader(source, environment, words)
    listed = reader.names()
    wanted = choose(list(listed))
    keep_inside(wanted)
    print(f"downloading {source}: {len(wanted)} files", flush=True)
    transfer(reader.files(wanted, listed), folder, words)


def files_at(path: str | None, names: Sequence[str]) -> list[str]:
    """The data files at a path, or all of them."""
    data = sorted(name for name in names if Path(name).suffix in READERS and not Path(name).name.startswith("."))
    return [name for name in data if path is None or name == path or name.startswith(f"{path}/")]


def _fetch(
    source: Repository,
    folder: Path,
    token: str | None,
    words: Words,
    choose: Callable[[Sequence[str]], list[str]],
    *,
    kind: str = "model",
) -> str:
    """The revision is resolved first: all files are of one commit."""
    from huggingface_hub import HfApi

    with hub_errors(source, words):
        hub = HfApi(token=token)
        look = hub.dataset_info if kind == "dataset" else hub.model_info
        info = look(source.name, revision=source.revision, files_metadata=True)
        listed = {file.rfilename: file for file in info.siblings or ()}
        wanted = choose(list(listed))
        commit = info.sha or source.revision
        print(f"downloading {source.name} at {source.revision} ({commit}): {len(wanted)} files", flush=True)
        if not wanted:
            raise SourceDeniedError(f"{source} has no file of a model that is not ignored; check the ignored patterns")
        place = _Place(source, commit, kind, folder, token, words)
        transfer([place.file(listed[name]) for name in wanted], folder, words)
    return commit


@dataclass(frozen=True)
class _Place:
    """A repository at a commit, and the folder that its files are for."""

    source: Repository
    commit: str
    kind: str
    folder: Path
    token: str | None
    words: Words

    def file(self, found: Any) -> RemoteFile:
        """`found`: a RepoSibling."""
        from huggingface_hub import constants

        digest = Digest("sha256", found.lfs.sha256) if found.lfs else Digest("git", found.blob_id)
        return RemoteFile(
            path=found.rfilename,
            size=found.size,
            version=digest.value,
            digest=digest,
            bring=partial(self._bring, found),
            # Over HTTP the hub serves no larger file: its client has another way.
            place=partial(self._place, found) if found.size > constants.MAX_HTTP_DOWNLOAD_SIZE else None,
        )

    def _bring(self, found: Any, stream: BinaryIO, start: int) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

        url = hf_hub_url(self.source.name, found.rfilename, repo_type=self.kind, revision=self.commit)
        headers = build_hf_headers(token=self.token)
        with hub_errors(self.source, self.words):
            http_get(url, stream, resume_size=start, headers=headers, expected_size=found.size)

    def _place(self, found: Any) -> None:
        from huggingface_hub import hf_hub_download

        with hub_errors(self.source, self.words):
            hf_hub_download(
                self.source.name,
                found.rfilename,
                repo_type=self.kind,
                revision=self.commit,
                local_dir=self.folder,
                token=self.token,
            )


def choose_files(names: Sequence[str], ignore_patterns: Sequence[str]) -> list[str]:
    """Those files that a run uses. The weights come in one format: safetensors; Meta's where there are no others."""
    wanted = [name for name in names if _matches(name, _USED) and not _matches(name, ignore_patterns)]
    if any(name.endswith(".safetensors") and "/" not in name for name in wanted):
        return [name for name in wanted if not _matches(name, _META)]
    return wanted


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any pattern fits, as huggingface_hub reads patterns: `*` goes over slashes, `x/` is all of a folder."""
    return any(fnmatch(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)


# --- tune download ----------------------------------------------------------------------------------------------------

_WORDS: Final = Words(
    authorize=f"give {{which}} with {_TOKEN_OPTION} or in the environment as {_TOKEN_VARIABLE}",
    revision="--revision",
    full="make room, or give another --output-dir; the same command then goes on where it stopped",
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
            clear(folder)
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
