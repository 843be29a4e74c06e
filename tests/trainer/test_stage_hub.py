"""Staging a model from the hub: what is fetched, what is refused, and what goes on where it stopped."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.paths import COMPLETE_FILE
from kubetune_contract.staging import StageSource
from kubetune_trainer.stage import stage

from .hub_server import COMMIT, REPO, TOKEN, HubServer, redirect, serve
from .stage_claim import Claim, flip


@pytest.fixture
def hub(published: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with a repository."""
    with serve(published) as server:
        claim.environment["HF_ENDPOINT"] = server.url
        redirect(monkeypatch, server, claim.root.parent / "home")
        yield server


def test_many_containers_may_stage_one_folder_at_once(claim: Claim, hub: HubServer) -> None:
    """Jobs with different tokens share the folder of a repository."""
    document = StageSource(path="huggingface/abc", repo=REPO)
    with ThreadPoolExecutor() as pool:
        staged = list(pool.map(lambda _: stage(document, claim.root), range(4)))
    assert staged == [claim.manifest("huggingface/abc").staged] * 4
    assert set(hub.downloads.values()) == {1}


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
    (hub.folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    message = claim.stage("huggingface/abc", repo=REPO)
    assert (claim.code, message.reason) == (ExitCode.INVALID_MODEL, "InvalidModel")
    assert message.message.startswith("config.json: the architecture is GPT2LMHeadModel")


# --- damage, room and what was resolved -------------------------------------------------------------------------------


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
