"""Staging from a bucket: the real client against a server that checks every signature."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.paths import COMPLETE_FILE
from kubetune_contract.progress import TerminationMessage

from .s3_server import BUCKET, KEY, SECRET, SESSION, S3Server, serve
from .stage_claim import Claim, flip

CASES = pytest.mark.parametrize
MODEL = f"s3://{BUCKET}/llama/tiny one"
RUN_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def s3(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A bucket with a tiny Llama, files that a run does not need, and data. The credentials are in the environment."""
    root = tmp_path / "bucket"
    (root / "llama").mkdir(parents=True)
    folder = tiny.rename(root / "llama" / "tiny one")
    (folder / "README.md").write_text("# Tiny")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (root / "llama" / "tiny one-v2").mkdir()
    (root / "llama" / "tiny one-v2" / "config.json").write_text("{}")
    row = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    for name in ("chats/a.jsonl", "chats/more/b.jsonl", "chats/notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{row}\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with serve(root) as server:
        yield server


@pytest.fixture
def stage(claim: Claim, s3: S3Server) -> Callable[..., TerminationMessage]:
    """stage(uri=...): stages the model, or what the changes say."""

    def run(**source: Any) -> TerminationMessage:
        return claim.stage("s3/tiny", **{"uri": MODEL, "endpoint": s3.url, **source})

    return run


def names(folder: Path) -> set[str]:
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {str(name) for name in found if name.parts[0][0] != "."}


def test_a_model_is_downloaded_without_what_no_run_needs(stage, claim: Claim, s3: S3Server) -> None:
    message = stage()
    assert message.reason == "Done", claim.output
    assert message.staged is not None
    assert (message.staged.parameters, message.staged.revision) == (44880, None)
    assert names(claim.root / "s3/tiny") == RUN_FILES
    for name in RUN_FILES:
        assert (claim.root / "s3/tiny" / name).read_bytes() == (s3.folder / "llama/tiny one" / name).read_bytes()
    assert s3.refused == []
    assert SECRET not in claim.output


def test_what_is_staged_is_not_asked_for_again(stage, s3: S3Server) -> None:
    first = stage()
    s3.broken = True
    assert stage() == first


def test_temporary_credentials_and_another_region_are_signed_too(
    stage, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.session, s3.region = SESSION, "eu-central-1"
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
    assert stage(region="eu-central-1").reason == "Done"


def test_a_public_bucket_needs_no_credentials(stage, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3.public = True
    assert stage().reason == "Done"


def test_a_broken_download_is_continued_where_it_stopped(stage, claim: Claim, s3: S3Server) -> None:
    key, size = "llama/tiny one/model.safetensors", (s3.folder / "llama/tiny one/model.safetensors").stat().st_size
    s3.cut[key] = size // 2
    message = stage()
    assert (claim.code, message.reason) == (ExitCode.SOURCE_UNAVAILABLE, "SourceUnavailable"), claim.output
    assert stage().reason == "Done"
    kept = 1 << 16  # whole chunks
    assert f"model.safetensors: going on behind {kept:,} of {size:,} bytes" in claim.output
    assert s3.sent[key] == size // 2 + size - kept
    assert s3.downloads["llama/tiny one/config.json"] == 1


def test_an_object_that_is_replaced_meanwhile_is_not_continued(stage, claim: Claim, s3: S3Server) -> None:
    key = "llama/tiny one/tokenizer.json"
    s3.cut[key] = 100
    stage()
    text = (s3.folder / key).read_text()
    (s3.folder / key).write_text(text + "\n")
    assert stage().reason == "Done"
    assert (claim.root / "s3/tiny/tokenizer.json").read_text() == text + "\n"


DIGESTS: dict[str, tuple[dict[str, Any], bool]] = {
    "put in one piece": ({}, True),
    "put in parts": ({"part": 50_000}, True),
    "put in parts by a service that does not tell their size": ({"part": 50_000, "tells_parts": False}, False),
    "encrypted with a key of KMS": ({"kms": True}, False),
}


@CASES(("how", "checked"), DIGESTS.values(), ids=DIGESTS.keys())
def test_an_etag_that_is_a_digest_is_checked(
    how: dict[str, Any], checked: bool, stage, claim: Claim, s3: S3Server
) -> None:
    vars(s3).update(how)
    s3.spoil.add("llama/tiny one/model.safetensors")
    message = stage()
    if checked:
        assert message.message.startswith("model.safetensors has arrived with another content than the source has told")
        message = stage()
        whole = (s3.folder / "llama/tiny one/model.safetensors").read_bytes()
        assert (claim.root / "s3/tiny/model.safetensors").read_bytes() == whole
    assert message.reason == "Done", claim.output
    assert ("the source has no digest of model.safetensors: only its size is checked" in claim.output) != checked


def test_a_damaged_file_is_found_and_it_alone_is_fetched_again(stage, claim: Claim, s3: S3Server) -> None:
    first = stage()
    s3.downloads.clear()
    flip(claim.root / "s3/tiny/model.safetensors", keep_time=False)
    assert stage() == first
    assert s3.downloads == {"llama/tiny one/model.safetensors": 1}


DATA = {
    "a folder": (f"s3://{BUCKET}/chats", [], {"a.jsonl", "more/b.jsonl"}),
    "a folder with a slash": (f"s3://{BUCKET}/chats/", [], {"a.jsonl", "more/b.jsonl"}),
    "one object": (f"s3://{BUCKET}/chats/more/b.jsonl", [], {"b.jsonl"}),
    "the whole bucket without what is ignored": (f"s3://{BUCKET}", ["llama/*", "*/a.jsonl"], {"chats/more/b.jsonl"}),
}


@CASES(("uri", "ignored", "wanted"), DATA.values(), ids=DATA.keys())
def test_data_are_downloaded(uri: str, ignored: list[str], wanted: set[str], stage, claim: Claim, s3: S3Server) -> None:
    message = stage(content="Dataset", uri=uri, ignore_patterns=ignored)
    assert message.reason == "Done", claim.output
    assert message.staged_data is not None
    assert message.staged_data.files == len(wanted)
    assert names(claim.root / "s3/tiny") == wanted


def _wrong_secret(s3: S3Server, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_SECRET_ACCESS_KEY", "another")


def _no_keys(s3: S3Server, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("AWS_ACCESS_KEY_ID")


def _elsewhere(s3: S3Server, patch: pytest.MonkeyPatch) -> None:
    s3.extra.append("llama/tiny one/../../../etc/config.json")


def _nothing(s3: S3Server, patch: pytest.MonkeyPatch) -> None:
    pass


def _broken(s3: S3Server, patch: pytest.MonkeyPatch) -> None:
    s3.broken = True


KEYS = "name a secret with keys that may in model.s3.credentialsSecretRef"
REFUSED: dict[str, tuple[Any, dict[str, Any], ExitCode, str]] = {
    "a wrong secret": (
        _wrong_secret,
        {},
        ExitCode.SOURCE_DENIED,
        f"may not be read (HTTP 403, SignatureDoesNotMatch): {KEYS}",
    ),
    "no keys": (_no_keys, {}, ExitCode.SOURCE_DENIED, f"may not be read (HTTP 403, AccessDenied): {KEYS}"),
    "no such bucket": (
        _nothing,
        {"uri": "s3://acme-none/llama"},
        ExitCode.SOURCE_DENIED,
        "does not exist (HTTP 404, NoSuchBucket): correct model.s3.uri",
    ),
    "no such prefix": (
        _nothing,
        {"uri": f"s3://{BUCKET}/llama/tiny"},
        ExitCode.SOURCE_DENIED,
        "holds no objects: correct model.s3.uri",
    ),
    "no model there": (
        _nothing,
        {"uri": f"s3://{BUCKET}/chats"},
        ExitCode.INVALID_MODEL,
        "has no file of a model that is not ignored; it holds a.jsonl, more/b.jsonl, notes.md",
    ),
    "no data there": (
        _nothing,
        {"uri": f"s3://{BUCKET}/chats/notes.md", "content": "Dataset"},
        ExitCode.INVALID_DATA,
        "has no data files that are not ignored; it holds notes.md",
    ),
    "a key that leads out of the folder": (
        _elsewhere,
        {},
        ExitCode.SOURCE_DENIED,
        "the source has a file '../../../etc/config.json', which would lie outside the folder",
    ),
    "a service that is not there": (
        _nothing,
        {"endpoint": "http://127.0.0.1:9"},
        ExitCode.SOURCE_UNAVAILABLE,
        "cannot be reached: ",
    ),
    "a service that does not work now": (
        _broken,
        {},
        ExitCode.SOURCE_UNAVAILABLE,
        "is not served now (HTTP 503, SlowDown)",
    ),
}


@CASES(("change", "source", "code", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_told_with_the_remedy(
    change, source, code, text, stage, claim: Claim, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubetune_trainer.bucket._TRIES", 1)
    change(s3, monkeypatch)
    message = stage(**source)
    assert (claim.code, message.reason) == (code, code.reason), claim.output
    assert text in message.message
    assert SECRET not in claim.output
    assert not (claim.root / "s3/tiny" / COMPLETE_FILE).exists()
