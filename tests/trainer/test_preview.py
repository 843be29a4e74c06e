"""The preview: what the model sees, with what it learns in brackets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kubetune_contract.config import RunConfig
from kubetune_trainer.preview import show
from kubetune_trainer.rows import DataError


def config(model: Path, data: Path, **options: Any) -> RunConfig:
    values = {"path": str(data), "format": "Instruct"} | options
    return RunConfig.model_validate({"model": {"path": str(model)}, "dataset": values, "output_dir": "unused"})


def test_the_first_rows_are_shown_with_what_is_learnt(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "What?", "output": "Lima."}\n{"input": 7}\n{}\n')
    shown = show(config(chat_folder(), tmp_path / "rows.jsonl"), count=2).split("\n\n---")
    assert shown[0] == "learnt is what stands in ⟦ ⟧"
    head, text = shown[1].split("\n", 1)
    assert head.startswith(f" {tmp_path}/rows.jsonl, line 1: ")
    assert head.endswith(" of them carry the loss")
    assert text == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦Lima.<|im_end|>⟧\n"
    assert shown[2] == f' {tmp_path}/rows.jsonl, line 2 cannot be used: "input" must be a text'
    assert len(shown) == 3


def test_both_sides_of_a_preference_are_shown_in_colour(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Q", "chosen": "A", "rejected": "B"}\n')
    shown = show(config(chat_folder(), tmp_path / "rows.jsonl", format="Preference"), colour=True)
    assert "line 1, chosen: " in shown
    assert "\x1b[32mB<|im_end|>\x1b[0m" in shown


def test_the_place_where_a_row_is_cut_is_marked(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "Q", "output": "' + "Lima " * 30 + '"}\n')
    shown = show(config(chat_folder(), tmp_path / "rows.jsonl", max_sequence_length=16))
    assert "cut after 16 (dataset.max_sequence_length)" in shown
    assert shown.count("✂") == 1
    assert shown.index("⟧") <= shown.index("✂")


def test_an_empty_file_is_told(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match="has no rows"):
        show(config(chat_folder(), tmp_path / "rows.jsonl"))
