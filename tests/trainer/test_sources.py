"""Datasets of the hub: which files are a split, which commit a run keeps, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kubetune_contract.dataset import DatasetConfig
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_trainer.rows import DataError
from kubetune_trainer.sources import choose_split, origin_of, pin

from .hub_server import COMMIT, REPO, TOKEN, HubServer, redirect, serve

SPLITS: dict[str, tuple[list[str], str, list[str]]] = {
    "files by name": (["test.jsonl", "train.jsonl"], "train", ["train.jsonl"]),
    "shards": (
        ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        "train",
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    ),
    "shards of a split with a longer name": (
        ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"],
        "train_sft",
        ["data/train_sft-00000-of-00001.parquet"],
    ),
    "shards are only of the split that they name": (["data/train_sft-00000-of-00001.parquet"], "train", []),
    "folders": (["dev/a.csv", "train/a.csv"], "validation", ["dev/a.csv"]),
    "a name inside another word does not count": (["trainers.csv", "my-train.csv"], "train", ["my-train.csv"]),
    "a repository without splits is all train": (["b.json", "a.json", "README.md"], "train", ["a.json", "b.json"]),
    "but nothing else": (["a.json"], "test", []),
}


@pytest.mark.parametrize("case", SPLITS)
def test_the_files_of_a_split(case: str) -> None:
    names, split, expected = SPLITS[case]
    assert choose_split(names, split) == expected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# Data")
    (folder / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    (folder / "data" / "test.jsonl").write_text('{"text": "two"}\n')
    with serve(folder) as server:
        redirect(monkeypatch, server, tmp_path)
        yield server


def test_the_files_of_a_split_come_into_the_cache_once(hub: HubServer) -> None:
    options = DatasetConfig(repo=REPO)
    commits = pin([options])
    assert commits == {f"{REPO} at revision main": COMMIT}
    for _ in range(2):
        origin = origin_of(options, commits)
        source = origin.source()
        assert [file.read_text() for file in source.files] == ['{"text": "one"}\n']
        assert (source.name, source.names) == (REPO, ["data/train.jsonl"])
    assert dict(hub.downloads) == {"data/train.jsonl": 1}
    assert origin.digest() == f"{REPO} {COMMIT} train"


def test_a_split_that_is_not_there_is_told_with_the_files(hub: HubServer) -> None:
    with pytest.raises(DataError, match=r"no files of the split 'dev2'.*: data/test\.jsonl, data/train\.jsonl"):
        origin_of(DatasetConfig(repo=REPO, split="dev2"), {}).source()


REFUSED = {
    "an unknown repository": ({"repo": "acme/none"}, "", ExitCode.SOURCE_DENIED, "acme/none at revision main does not"),
    "an unknown revision": (
        {"repo": REPO, "revision": "v9"},
        "",
        ExitCode.SOURCE_DENIED,
        "has no revision v9: correct dataset.revision",
    ),
    "a private repository": ({"repo": REPO}, "private", ExitCode.SOURCE_DENIED, "in the environment as HF_TOKEN"),
    "a gated repository": ({"repo": REPO}, "gated", ExitCode.SOURCE_DENIED, "is gated: accept its terms on the hub"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_told_with_the_remedy(case: str, hub: HubServer) -> None:
    options, trait, code, words = REFUSED[case]
    if trait:
        setattr(hub, trait, True)
    with pytest.raises(JobError, match=words) as caught:
        origin_of(DatasetConfig(**options), {}).source()
    assert caught.value.exit_code == code


def test_a_token_in_the_environment_opens_a_gated_repository(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(origin_of(DatasetConfig(repo=REPO), {}).source().files) == 1


def test_a_hub_that_does_not_answer_is_worth_a_retry(hub: HubServer) -> None:
    hub.broken = True
    with pytest.raises(JobError, match="the hub does not serve") as caught:
        pin([DatasetConfig(repo=REPO)])
    assert caught.value.exit_code == ExitCode.SOURCE_UNAVAILABLE
