"""Staging as its container runs it: a process with a source, a claim and a termination log."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.paths import COMPLETE_FILE, TERMINATION_LIMIT
from kubetune_contract.staging import StageSource
from kubetune_trainer.stage import LOCK_FILE, _words, main, stage
from kubetune_trainer.transfer import StorageError, storage

from .hub_server import COMMIT, REPO, TOKEN, HubServer, redirect, serve
from .stage_claim import Claim


@pytest.fixture
def claim(tmp_path: Path) -> Claim:
    return Claim(tmp_path)


@pytest.fixture
def hub(tiny: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with a repository: a tiny Llama, and files that a run does not need."""
    (tiny / "README.md").write_text("# Tiny")
    (tiny / "LICENSE").write_text("Apache-2.0")
    (tiny / "original").mkdir()
    (tiny / "original" / "consolidated.00.pth").write_bytes(b"the same weights again")
    with serve(tiny) as server:
        claim.environment["HF_ENDPOINT"] = server.url
        redirect(monkeypatch, server, claim.root.parent / "home")
        yield server


# --- files that somebody put there ------------------------------------------------------------------------------------


def test_a_whole_model_is_described_and_gets_its_manifest(claim: Claim, llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(shards=2).rename(claim.root / "tiny")
    message = claim.run("tiny")
    files = [file for file in folder.iterdir() if file.name[0] != "."]
    total = sum(file.stat().st_size for file in files)
    assert (claim.code, message.reason) == (0, "Done")
    assert message.message == f"tiny is ready: 44,880 parameters, {total / 1e9:.2f} GB"
    assert message.staged is not None
    assert message.staged.to_dict() == {
        "path": "tiny",
        "architecture": "LlamaForCausalLM",
        "parameters": 44880,
        "bytes": total,
        "sizes": {
            "vocabSize": 97,
            "hiddenSize": 48,
            "intermediateSize": 80,
            "numHiddenLayers": 2,
            "numAttentionHeads": 6,
            "numKeyValueHeads": 2,
            "headDim": 8,
            "tieWordEmbeddings": False,
        },
    }
    manifest = claim.manifest("tiny")
    assert manifest.staged == message.staged
    assert {file.path: file.sha256 for file in manifest.files} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert sorted(file.name for file in folder.glob(".*")) == [COMPLETE_FILE, LOCK_FILE]


def access_times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_atime_ns for file in folder.glob("*.safetensors")}


def test_a_model_that_was_checked_is_not_read_again(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    first = claim.stage("tiny")
    manifest = (folder / COMPLETE_FILE).stat()
    for file in folder.glob("*.safetensors"):  # access times move only from before the last change, under relatime
        os.utime(file, ns=(0, file.stat().st_mtime_ns))
    before = access_times(folder)
    assert claim.stage("tiny") == first
    assert (folder / COMPLETE_FILE).stat().st_mtime_ns == manifest.st_mtime_ns
    assert access_times(folder) == before
    assert "checked" not in claim.output


def replace_by_older(file: Path) -> None:
    """Another file of the same size and an older time, as rsync -a would put there."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 10**18))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file was replaced by one of the same size and an older time": lambda f: replace_by_older(
        f / "model.safetensors"
    ),
    "a file was written again": lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes()),
    "a file of the manifest is gone": lambda f: (f / "tokenizer_config.json").unlink(),
    "the manifest is damaged": lambda f: (f / COMPLETE_FILE).write_text('{"version": 1'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_model_is_checked_again(change: Callable[[Path], object], claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    time.sleep(0.01)  # one tick of the file system's clock
    change(folder)
    assert claim.stage("tiny").reason == "Done"
    assert "checked model.safetensors" in claim.output
    assert {file.path: file.sha256 for file in claim.manifest("tiny").files} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.name[0] != "."
    }


def test_a_renamed_folder_is_checked_again(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    folder.rename(claim.root / "other")
    message = claim.stage("other")
    assert message.staged is not None
    assert message.staged.path == claim.manifest("other").staged.path == "other"


def gpt2(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a missing folder": (
        "tinny",
        lambda folder: None,
        "the folder {root}/tinny does not exist: {root} has no tinny; did you mean tiny?",
    ),
    "no Llama": (
        "tiny",
        gpt2,
        "config.json: the architecture is GPT2LMHeadModel; supported is LlamaForCausalLM, the text models of Llama 2, "
        "3, 3.1, 3.2, 3.3 and every model of the same form",
    ),
    "a truncated file": (
        "tiny",
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        "{root}/tiny/model.safetensors is truncated: its header promises 179,520 bytes of weights, 97,880 are there; "
        "copy or download it again",
    ),
    "no tokenizer": (
        "tiny",
        lambda folder: (folder / "tokenizer.json").unlink(),
        "{root}/tiny has no tokenizer.json; found: config.json, model.safetensors, tokenizer_config.json; give a "
        "folder in Hugging Face layout: config.json, tokenizer.json and safetensors files; or in "
        "Meta's: params.json, tokenizer.model and consolidated.*.pth",
    ),
}


@pytest.mark.parametrize(("path", "damage", "text"), BAD.values(), ids=BAD.keys())
def test_a_model_that_cannot_be_trained_is_refused_with_the_reason(
    path: str, damage: Callable[[Path], object], text: str, claim: Claim, tiny: Path
) -> None:
    folder = tiny.rename(claim.root / "tiny")
    damage(folder)
    message = claim.stage(path)
    assert (claim.code, message.reason) == (ExitCode.INVALID_MODEL, "InvalidModel")
    assert message.message == text.format(root=claim.root)
    assert message.staged is None
    assert not (folder / COMPLETE_FILE).exists()


def test_a_claim_that_cannot_be_written_is_told_with_the_remedy(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    folder.chmod(0o555)
    # Root may write everywhere, unless this right is taken from it.
    prefix = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override") if os.geteuid() == 0 else ()
    message = claim.run("tiny", prefix=prefix)
    assert (claim.code, message.reason) == (ExitCode.OUTPUT_NOT_WRITABLE, "OutputNotWritable")
    assert message.message == (
        f"{folder}/.complete.lock cannot be written: Permission denied; make the models claim writable for user "
        f"{os.geteuid()}: staging writes downloads and .complete"
    )
    folder.chmod(0o755)


STORAGE = {
    "full": (errno.ENOSPC, "enlarge the models claim, or delete models that are no longer used"),
    "over the quota": (errno.EDQUOT, "enlarge the models claim, or delete models that are no longer used"),
    "mounted read-only": (errno.EROFS, f"make the models claim writable for user {os.getuid()}: staging writes"),
}


@pytest.mark.parametrize(("number", "remedy"), STORAGE.values(), ids=STORAGE.keys())
def test_errors_of_the_file_system_have_a_remedy(number: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=remedy), storage(Path("/models/x"), _words(StageSource(path="x"))):
        raise OSError(number, os.strerror(number), "/models/x/file")


def test_other_errors_of_the_file_system_are_not_blamed_on_the_user() -> None:
    with (
        pytest.raises(OSError, match="Input/output error") as caught,
        storage(Path("/models/x"), _words(StageSource(path="x"))),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, StorageError)


def test_a_source_that_is_none_is_a_config_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", '{"revisoin": "x"}', "--root", str(tmp_path)]) == ExitCode.INVALID_CONFIG
    assert capsys.readouterr().err == "path: a value is required; revisoin: unknown field; did you mean revision?\n"


def test_a_crash_is_told_and_counts_as_a_crash(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    (folder / COMPLETE_FILE).mkdir()
    message = claim.stage("tiny")
    assert (claim.code, message.reason) == (ExitCode.CRASH, "Crash")
    assert message.message.startswith("IsADirectoryError: ")
    assert "Traceback" in claim.output


def test_a_killed_staging_leaves_no_manifest_and_the_next_one_works(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    (folder / f"{COMPLETE_FILE}.partial").write_text('{"version": 1, "mo')
    (folder / LOCK_FILE).touch()
    assert claim.stage("tiny").reason == "Done"
    assert sorted(file.name for file in folder.glob(".*")) == [COMPLETE_FILE, LOCK_FILE]


def test_many_containers_may_stage_one_folder_at_once(claim: Claim, hub: HubServer) -> None:
    """Jobs with different tokens share the folder of a repository."""
    document = StageSource(path="huggingface/abc", repo=REPO)
    with ThreadPoolExecutor() as pool:
        staged = list(pool.map(lambda _: stage(document, claim.root), range(4)))
    assert staged == [claim.manifest("huggingface/abc").staged] * 4
    assert set(hub.downloads.values()) == {1}


# --- files from the hub -----------------------------------------------------------------------------------------------


def test_a_repository_is_downloaded_without_what_no_run_needs(claim: Claim, hub: HubServer) -> None:
    message = claim.run("huggingface/abc", repo=REPO)
    folder = claim.root / "huggingface" / "abc"
    assert message.reason == "Done", claim.output
    assert {file.name for file in folder.iterdir() if file.name[0] != "."} == {
        "LICENSE",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for file in claim.manifest("huggingface/abc").files:
        assert (folder / file.path).read_bytes() == (hub.folder / file.path).read_bytes()
    assert f"downloading {REPO} at main ({COMMIT})" in claim.output


def test_what_is_staged_is_not_asked_for_again(claim: Claim, hub: HubServer) -> None:
    first = claim.stage("huggingface/abc", repo=REPO)
    hub.requests = 0
    assert claim.stage("huggingface/abc", repo=REPO) == first
    assert hub.requests == 0


@pytest.mark.parametrize("revision", ["v1", COMMIT], ids=["a tag", "a commit"])
def test_a_revision_is_downloaded(revision: str, claim: Claim, hub: HubServer) -> None:
    assert claim.stage("huggingface/abc", repo=REPO, revision=revision).reason == "Done"


def test_ignored_files_are_not_downloaded(claim: Claim, hub: HubServer) -> None:
    claim.stage("huggingface/abc", repo=REPO, ignore_patterns=["LIC*"])
    assert "LICENSE" not in hub.sent
    assert "model.safetensors" in hub.sent


def test_a_broken_download_is_continued_where_it_stopped(
    claim: Claim, hub: HubServer, llama_folder: Callable[..., Path]
) -> None:
    hub.folder = llama_folder(vocab_size=80_000)
    size = (hub.folder / "model.safetensors").stat().st_size
    assert size > 30e6  # the client writes in pieces of 10 MB
    hub.cut["model.safetensors"] = 25_000_000
    for _ in range(3):
        message = claim.stage("huggingface/abc", repo=REPO)
        if message.reason == "Done":
            break
        assert (claim.code, message.reason) == (ExitCode.SOURCE_UNAVAILABLE, "SourceUnavailable"), claim.output
    assert message.reason == "Done"
    assert hub.sent["model.safetensors"] <= size + 10_000_000
    assert (claim.root / "huggingface/abc/model.safetensors").read_bytes() == (
        hub.folder / "model.safetensors"
    ).read_bytes()


def gate(hub: HubServer) -> None:
    hub.gated = True


def hide(hub: HubServer) -> None:
    hub.private = True


@pytest.mark.parametrize("lock", [gate, hide], ids=["gated", "private"])
def test_a_token_opens_a_closed_repository(
    lock: Callable[[HubServer], None], claim: Claim, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert claim.stage("huggingface/abc", repo=REPO).reason == "Done"


NOT_READABLE = (
    "{repo} at revision main does not exist or this token may not read it (HTTP {status}): check the name, and name a "
    "secret with a token that may in model.huggingFace.tokenSecretRef"
)
REFUSED: dict[str, tuple[Callable[[HubServer], object], dict[str, str], str]] = {
    "gated, without a token": (
        gate,
        {"repo": REPO},
        f"{REPO} at revision main is gated: accept its terms on the hub with the account of your token, and name a "
        "secret with that token in model.huggingFace.tokenSecretRef",
    ),
    "private, without a token": (hide, {"repo": REPO}, NOT_READABLE.format(repo=REPO, status=401)),
    "no such repository": (
        lambda hub: None,
        {"repo": "acme/none"},
        NOT_READABLE.format(repo="acme/none", status=404),
    ),
    "no such revision": (
        lambda hub: None,
        {"repo": REPO, "revision": "v9"},
        f"{REPO} has no revision v9: correct model.huggingFace.revision",
    ),
}


@pytest.mark.parametrize(("lock", "source", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_download_is_told_with_the_remedy(
    lock: Callable[[HubServer], object], source: dict[str, str], text: str, claim: Claim, hub: HubServer
) -> None:
    lock(hub)
    message = claim.stage("huggingface/abc", **source)
    assert (claim.code, message.reason) == (ExitCode.SOURCE_DENIED, "SourceDenied"), claim.output
    assert message.message == text


def test_a_refusal_is_told_even_if_files_lie_there(claim: Claim, hub: HubServer) -> None:
    """The hub's client alone would take the folder as it is."""
    claim.stage("huggingface/abc", repo=REPO)
    (claim.root / "huggingface/abc" / COMPLETE_FILE).unlink()
    (claim.root / "huggingface/abc" / "model.safetensors").unlink()
    hide(hub)
    assert claim.stage("huggingface/abc", repo=REPO).reason == "SourceDenied"


def test_a_name_that_is_no_repository_is_denied(claim: Claim, hub: HubServer) -> None:
    message = claim.stage("huggingface/abc", repo="a/b/c")
    assert (claim.code, message.reason) == (ExitCode.SOURCE_DENIED, "SourceDenied")
    assert message.message.startswith("'a/b/c' is no repository of the Hugging Face hub: ")


def test_a_hub_that_does_not_work_now_is_worth_a_retry(claim: Claim, hub: HubServer) -> None:
    hub.broken = True
    message = claim.stage("huggingface/abc", repo=REPO)
    assert (claim.code, message.reason) == (ExitCode.SOURCE_UNAVAILABLE, "SourceUnavailable"), claim.output
    assert message.message.startswith(f"the hub does not serve {REPO} at revision main now (HTTP 503): ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)],
    ids=["nobody listens", "switched off"],
)
def test_a_hub_that_cannot_be_reached_is_worth_a_retry(
    name: str, value: object, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, name, value)
    message = claim.stage("huggingface/abc", repo=REPO)
    assert (claim.code, message.reason) == (ExitCode.SOURCE_UNAVAILABLE, "SourceUnavailable"), claim.output
    assert message.message.startswith(f"the hub cannot be reached for {REPO} at revision main: ")


def test_a_repository_of_another_architecture_is_no_model_for_us(claim: Claim, hub: HubServer) -> None:
    gpt2(hub.folder)
    message = claim.stage("huggingface/abc", repo=REPO)
    assert (claim.code, message.reason) == (ExitCode.INVALID_MODEL, "InvalidModel")
    assert message.message.startswith("config.json: the architecture is GPT2LMHeadModel")


def test_a_long_message_fits_the_kubelets_limit(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    (folder / "config.json").write_text(json.dumps({"architectures": ["X" * 10_000]}))
    claim.stage("tiny")
    assert claim.log.stat().st_size <= TERMINATION_LIMIT


def test_a_laptop_has_no_termination_log(claim: Claim, tiny: Path) -> None:
    shutil.move(tiny, claim.root / "tiny")
    claim.log.unlink()
    with pytest.raises(FileNotFoundError, match="termination-log"):
        claim.stage("tiny")
    assert claim.code == 0


# --- damage, room and what was resolved -------------------------------------------------------------------------------


def flip(file: Path, *, keep_time: bool) -> None:
    """Damage one byte."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if keep_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


DAMAGE: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "another byte, and another time": (lambda file: flip(file, keep_time=False), {}),
    "another byte alone, at the next full check": (lambda file: flip(file, keep_time=True), {"trusted_seconds": 0}),
    "another size": (grow, {}),
    "gone": (lambda file: file.unlink(), {}),
}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"], ids=["a large file", "a small file"])
@pytest.mark.parametrize(("damage", "source"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_found_and_it_alone_is_fetched_again(
    name: str, damage: Callable[[Path], object], source: dict[str, Any], claim: Claim, hub: HubServer
) -> None:
    first = claim.stage("huggingface/abc", repo=REPO)
    hub.downloads.clear()
    damage(claim.root / "huggingface/abc" / name)
    assert claim.stage("huggingface/abc", repo=REPO, **source) == first, claim.output
    assert hub.downloads == {name: 1}
    assert (claim.root / "huggingface/abc" / name).read_bytes() == (hub.folder / name).read_bytes()


def test_damage_that_only_digests_show_waits_for_the_next_full_check(claim: Claim, hub: HubServer) -> None:
    """Nobody reads 140 GB for each job."""
    claim.stage("huggingface/abc", repo=REPO)
    flip(claim.root / "huggingface/abc/model.safetensors", keep_time=True)
    hub.requests = 0
    assert claim.stage("huggingface/abc", repo=REPO, trusted_seconds=3600).reason == "Done"
    assert hub.requests == 0
    complete = claim.root / "huggingface/abc" / COMPLETE_FILE
    os.utime(complete, (time.time() - 3601,) * 2)
    assert claim.stage("huggingface/abc", repo=REPO, trusted_seconds=3600).reason == "Done"
    assert hub.downloads["model.safetensors"] == 2


def test_a_full_check_that_finds_nothing_is_written_down(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    os.utime(folder / COMPLETE_FILE, (0, 0))
    assert claim.stage("tiny").reason == "Done"
    assert time.time() - (folder / COMPLETE_FILE).stat().st_mtime < 60


def test_damage_of_files_that_somebody_put_there_is_told(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    flip(folder / "model.safetensors", keep_time=True)
    message = claim.stage("tiny", trusted_seconds=0)
    assert (claim.code, message.reason) == (ExitCode.INVALID_MODEL, "InvalidModel")
    assert message.message.startswith(f"{folder}/model.safetensors is damaged: its content has changed since 20")
    assert message.message.endswith("copy it again, or `touch` it if the change is meant")


def test_a_file_that_arrives_damaged_is_not_taken(claim: Claim, hub: HubServer) -> None:
    hub.spoil.add("config.json")
    message = claim.stage("huggingface/abc", repo=REPO)
    assert (claim.code, message.reason) == (ExitCode.SOURCE_UNAVAILABLE, "SourceUnavailable"), claim.output
    assert message.message.startswith("config.json has arrived with another content than the source has told (git ")
    assert not (claim.root / "huggingface/abc/config.json").exists()
    assert claim.stage("huggingface/abc", repo=REPO).reason == "Done"


def test_a_download_that_has_no_room_is_told_before_it_begins(
    claim: Claim, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.statvfs(claim.root)
    small = os.statvfs_result((free.f_bsize, 1, *free[2:4], 100_000, *free[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    message = claim.stage("huggingface/abc", repo=REPO)
    needed = sum((hub.folder / name).stat().st_size for name in ("model.safetensors", "config.json", "LICENSE"))
    needed += sum((hub.folder / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json"))
    assert (claim.code, message.reason) == (ExitCode.STORAGE_FULL, "StorageFull"), claim.output
    assert message.message == (
        f"{claim.root}/huggingface/abc: {needed:,} bytes (0.00 GB) are still to be downloaded, but only 100,000 "
        "(0.00 GB) are free; enlarge the models claim, or delete models that are no longer used"
    )
    assert hub.sent == {}


def test_a_revision_stays_what_it_was_when_its_files_first_came(claim: Claim, hub: HubServer) -> None:
    first = claim.stage("huggingface/abc", repo=REPO)
    assert first.staged is not None
    assert first.staged.revision == claim.manifest("huggingface/abc").staged.revision == COMMIT
    (claim.root / "huggingface/abc/config.json").unlink()
    hub.moved = True
    assert claim.stage("huggingface/abc", repo=REPO) == first
    assert f"downloading {REPO} at {COMMIT} ({COMMIT})" in claim.output


def test_a_killed_staging_goes_on_behind_the_bytes_that_it_has(
    claim: Claim, hub: HubServer, llama_folder: Callable[..., Path]
) -> None:
    hub.folder = llama_folder(vocab_size=80_000)
    size = (hub.folder / "model.safetensors").stat().st_size
    hub.stall["model.safetensors"] = 25_000_000
    container = claim.start("huggingface/abc", repo=REPO)
    halves = claim.root / "huggingface/abc/.cache/kubetune"
    while sum(file.stat().st_size for file in halves.glob("*")) < 20_000_000:
        assert container.poll() is None
        time.sleep(0.05)
    container.kill()
    container.communicate()
    hub.go_on.set()
    kept = sum(file.stat().st_size for file in halves.glob("*"))
    sent = hub.sent["model.safetensors"]
    assert claim.stage("huggingface/abc", repo=REPO).reason == "Done"
    assert f"model.safetensors: going on behind {kept:,} of {size:,} bytes" in claim.output
    assert hub.sent["model.safetensors"] - sent == size - kept
    assert not halves.exists()


# --- data from the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def chats(claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A dataset repository."""
    folder = tmp_path / "chats"
    rows = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    for name in ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "extra/more.jsonl", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{rows}\n")
    with serve(folder) as server:
        redirect(monkeypatch, server, claim.root.parent / "home")
        yield server


DATA = {
    "the training split": ({}, {"data/train-00000-of-00001.jsonl"}),
    "another split": ({"split": "test"}, {"data/test-00000-of-00001.jsonl"}),
    "one file": ({"file": "extra/more.jsonl"}, {"extra/more.jsonl"}),
    "a folder": ({"file": "data"}, {"data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"}),
    "a folder without what is ignored": (
        {"file": "data", "ignore_patterns": ["*/test-*"]},
        {"data/train-00000-of-00001.jsonl"},
    ),
}


@pytest.mark.parametrize(("source", "wanted"), DATA.values(), ids=DATA.keys())
def test_data_are_downloaded_and_nothing_else(
    source: dict[str, Any], wanted: set[str], claim: Claim, chats: HubServer
) -> None:
    message = claim.stage("huggingface/chats", content="Dataset", repo=REPO, **source)
    folder = claim.root / "huggingface/chats"
    size = sum((folder / name).stat().st_size for name in wanted)
    assert message.reason == "Done", claim.output
    assert message.staged_data is not None
    assert message.staged_data.to_dict() == {
        "path": "huggingface/chats",
        "files": len(wanted),
        "bytes": size,
        "revision": COMMIT,
    }
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.jsonl")} == wanted
    assert claim.stage("huggingface/chats", content="Dataset", repo=REPO, **source) == message
    assert set(chats.downloads.values()) == {1}


NO_DATA = {
    "no such file": ({"file": "trian.jsonl"}, "has no data files at trian.jsonl; its data files are: "),
    "no such split": ({"split": "dev"}, "has no data files of the split 'dev'; its data files are: "),
    "a file of another kind": ({"file": "README.md"}, "has no data files at README.md; its data files are: "),
}


@pytest.mark.parametrize(("source", "text"), NO_DATA.values(), ids=NO_DATA.keys())
def test_a_repository_without_the_data_is_told_with_what_it_has(
    source: dict[str, Any], text: str, claim: Claim, chats: HubServer
) -> None:
    message = claim.stage("huggingface/chats", content="Dataset", repo=REPO, **source)
    assert (claim.code, message.reason) == (ExitCode.INVALID_DATA, "InvalidData"), claim.output
    assert text in message.message
    assert "data/train-00000-of-00001.jsonl" in message.message


def test_closed_data_are_told_in_words_that_fit_every_dataset(claim: Claim, chats: HubServer) -> None:
    hide(chats)
    message = claim.stage("huggingface/chats", content="Dataset", repo=REPO)
    assert message.message.endswith("name a secret with a token that may in huggingFace.tokenSecretRef of this dataset")
