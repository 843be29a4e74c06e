"""Staging data from the hub: the files that the source names, and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kubetune_contract.exit_codes import ExitCode

from .hub_server import COMMIT, REPO, HubServer, redirect, serve
from .stage_claim import Claim


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
    chats.private = True
    message = claim.stage("huggingface/chats", content="Dataset", repo=REPO)
    assert message.message.endswith("name a secret with a token that may in huggingFace.tokenSecretRef of this dataset")
