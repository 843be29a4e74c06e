"""Tokenized data: made once, by one process, complete or absent; made anew when anything changes that decides it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kubetune_contract.dataset import DatasetConfig
from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer import cache, tokens
from kubetune_trainer.cache import CacheError, cache_folder, load_tokenized
from kubetune_trainer.distributed import World
from kubetune_trainer.sources import origin_of
from kubetune_trainer.tokenizer import Tokenizer
from kubetune_trainer.tokens import Tokenized

NextFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def model(chat_folder: NextFolder) -> Path:
    return chat_folder()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are filled, one by one."""
    filled: list[Path] = []

    def write(folder: Path, *arguments: Any) -> Any:
        filled.append(folder)
        return tokens.write_tokenized(folder, *arguments)

    monkeypatch.setattr(cache, "write_tokenized", write)
    return filled


def write_rows(path: Path, *answers: str) -> Path:
    path.write_text("".join(json.dumps({"input": "?", "output": answer}) + "\n" for answer in answers))
    return path


def load(path: Path, model: Path, folder: Path, **options: Any) -> Tokenized:
    dataset = DatasetConfig(path=str(path), format="Instruct", **options)
    tokenizer = Tokenizer.from_folder(model)
    return load_tokenized(origin_of(dataset, {}), dataset, dataset, tokenizer, folder)


def test_a_second_start_reads_what_the_first_has_made(model: Path, tmp_path: Path, made: list[Path]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "one", "two")
    first, second = (load(rows, model, tmp_path / "cache") for _ in range(2))
    assert len(made) == 1
    assert isinstance(second.ids, np.memmap)
    assert second.ids.tolist() == first.ids.tolist()
    assert second.counts == first.counts
    assert load(write_rows(tmp_path / "copy.jsonl", "one", "two"), model, tmp_path / "cache").counts.rows == 2
    assert len(made) == 1, "the same content under another name"


CHANGES: dict[str, dict[str, Any]] = {
    "the length": {"max_sequence_length": 64},
    "what is learnt": {"train_on": "All"},
    "the columns": {"columns": {"input": "output"}},
    "the template": {"prompt_template": {"name": "Summarize"}},
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_option_makes_other_tokens(case: str, model: Path, tmp_path: Path, made: list[Path]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "one")
    load(rows, model, tmp_path / "cache")
    load(rows, model, tmp_path / "cache", **CHANGES[case])
    assert len(made) == 2


def test_changed_rows_and_templates_make_other_tokens(
    model: Path, chat_folder: NextFolder, tmp_path: Path, made: list[Path]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "one")
    load(rows, model, tmp_path / "cache")
    load(write_rows(tmp_path / "rows.jsonl", "two"), model, tmp_path / "cache")
    load(rows, chat_folder("{% for m in messages %}{{ m.content }}{% endfor %}"), tmp_path / "cache")
    assert len(made) == 3


def test_options_that_decide_no_tokens_do_not(model: Path, tmp_path: Path, made: list[Path]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "one")
    load(rows, model, tmp_path / "cache")
    load(rows, model, tmp_path / "cache", packed=True, shuffle=False, weight=0.5, max_bad_rows=3)
    assert len(made) == 1


def test_a_killed_start_leaves_nothing_that_counts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, folder = write_rows(tmp_path / "rows.jsonl", "one"), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        patch.setattr(tokens.os, "fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(rows, model, folder)
    assert [path.suffix for path in folder.iterdir() if path.is_dir()] != []
    assert load(rows, model, folder).counts.rows == 1
    assert not list(folder.glob("*.partial-*"))


def load_slowly(world: World, rows: Path, model: Path, folder: Path) -> int:
    """How many documents this process has made; slow enough that the others come meanwhile."""
    made: list[Path] = []

    def write(place: Path, *arguments: Any) -> Any:
        time.sleep(0.5)
        made.append(place)
        return tokens.write_tokenized(place, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "write_tokenized", write)
        assert load(rows, model, folder).counts.rows == 2
    return len(made)


def test_one_of_several_processes_writes_and_the_others_wait(
    model: Path, tmp_path: Path, spawn: Callable[..., list[Any]]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "one", "two")
    assert sum(spawn(3, load_slowly, rows, model, tmp_path / "cache")) == 1


def test_a_folder_that_cannot_be_written_is_told_with_the_variable(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rows = write_rows(tmp_path / "rows.jsonl", "one")
    with pytest.raises(CacheError, match="set KUBETUNE_CACHE to a folder with rights and space") as caught:
        load(rows, model, tmp_path / "file" / "cache")
    assert caught.value.exit_code == ExitCode.OUTPUT_NOT_WRITABLE


def test_where_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNE_CACHE", "/somewhere")
    assert cache_folder(Path("out")) == Path("/somewhere")
    monkeypatch.delenv("KUBETUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(Path("out")) == tmp_path / ".cache" / "kubetune" / "tokens"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_folder(Path("out")) == Path("out/cache")
