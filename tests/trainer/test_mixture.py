"""Several datasets, held-out parts, pairs and packed sequences: what a row of a Dataset is, and what a batch holds."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kubetune_contract.config import RunConfig
from kubetune_contract.dataset import DatasetConfig
from kubetune_trainer.cache import cache_folder
from kubetune_trainer.data import Data, Dataset, describe, load_data, load_questions
from kubetune_trainer.model import IGNORE
from kubetune_trainer.rows import DataError
from kubetune_trainer.tokenizer import Tokenizer

SUMS = [{"input": f"{a}+{b}?", "output": f"{a + b}."} for a in range(10) for b in range(5)]


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_folder(chat_folder())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tokenizer: Tokenizer, dataset: dict[str, Any], **changes: Any) -> tuple[Data, DatasetConfig]:
    values = {"model": {"path": "unused"}, "dataset": dataset, "output_dir": "unused"} | changes
    config = RunConfig.model_validate(values)
    return load_data(config, tokenizer, cache_folder(Path()), {}), config.dataset


def texts(data: Dataset, tokenizer: Tokenizer) -> list[list[str]]:
    """What is learnt of each document of each row."""
    found = []
    for row in range(len(data)):
        labels = [sample.labels[sample.labels != IGNORE].tolist() for sample in data.samples(row)]
        found.append([tokenizer.decode(ids) for ids in labels])
    return found


def test_a_mixture_is_its_datasets_one_after_another(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}] * 3
    other = {"path": write(tmp_path / "chats.jsonl", chats), "format": "OpenAI", "weight": 2}
    sums = {"path": write(tmp_path / "sums.jsonl", SUMS[:2]), "format": "Instruct"}
    (data, _), config = load(tokenizer, sums | {"mixture": [other]})
    assert texts(data, tokenizer) == [["0."], ["1."], ["!"], ["!"], ["!"]]
    assert [(share.first, share.stop, share.weight) for share in data.shares] == [(0, 2, 1), (2, 5, 2)]
    assert data.places([0, 4, 4]) == [f"{tmp_path}/sums.jsonl:1", f"{tmp_path}/chats.jsonl:3"]
    assert describe(data, config).startswith(f"{tmp_path}/sums.jsonl, {tmp_path}/chats.jsonl: 5 conversations; ")


def test_a_folder_is_read_file_by_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", SUMS[2:4])
    write(tmp_path / "a.jsonl", SUMS[:2])
    (data, _), _ = load(tokenizer, {"path": str(tmp_path), "format": "Instruct"})
    assert texts(data, tokenizer) == [["0."], ["1."], ["2."], ["3."]]
    assert data.places([3]) == [f"{tmp_path}/b.jsonl:2"]


# --- bad rows ---


def bad_rows(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": 7}\n\n{\n')
    return {"path": str(tmp_path / "rows.jsonl"), "format": "Instruct"}


def test_tolerated_bad_rows_are_left_out_and_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (data, _), config = load(tokenizer, bad_rows(tmp_path) | {"max_bad_rows": 2})
    assert texts(data, tokenizer) == [["b"]]
    assert (
        f"2 left out, because they are malformed (dataset.max_bad_rows), such as {tmp_path}/rows.jsonl: line 2: "
        in describe(data, config)
    )


def test_one_more_than_are_tolerated_ends_the_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tokenizer, bad_rows(tmp_path) | {"max_bad_rows": 1})
    words = '"input" must be a text; line 4: not JSON ('
    told = f"2 rows cannot be used, but dataset.max_bad_rows is 1: {tmp_path}/rows.jsonl: line 2: {words}"
    assert str(caught.value).startswith(told)


# --- held-out parts ---


def test_a_held_out_part_is_drawn_from_the_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = {"path": write(tmp_path / "sums.jsonl", SUMS), "format": "Instruct"}

    def parts(seed: int) -> tuple[list[int], list[int]]:
        changes = {"validation": {"fraction": 0.2}, "training": {"seed": seed}}
        (training, held_out), _ = load(tokenizer, dataset, **changes)
        assert held_out is not None
        return training.parts[0].chosen.tolist(), held_out.parts[0].chosen.tolist()

    training, held_out = parts(1)
    assert len(held_out) == 10
    assert sorted(training + held_out) == list(range(50))
    assert parts(1) == (training, held_out)
    assert parts(2) != (training, held_out)


def test_questions_come_from_the_held_out_part(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = {"path": write(tmp_path / "sums.jsonl", SUMS), "format": "Instruct"}
    (_, held_out), config = load(tokenizer, dataset, validation={"fraction": 0.1})
    assert held_out is not None
    questions = load_questions(held_out.parts, 3, config, tokenizer)
    assert [question.text for question in questions] == [SUMS[row]["input"] for row in held_out.parts[0].chosen[:3]]
    assert "10% of them here (validation.fraction)" in describe(held_out, config)


def test_a_part_that_leaves_nothing_to_train_on_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = {"path": write(tmp_path / "sums.jsonl", SUMS[:2]), "format": "Instruct"}
    with pytest.raises(DataError, match=r"has 2 usable rows, of which validation\.fraction 0\.9 leaves none"):
        load(tokenizer, dataset, validation={"fraction": 0.9})


# --- pairs ---


def test_a_pair_is_its_chosen_and_its_rejected_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1?", "chosen": "2", "rejected": "eleven"},
        {"prompt": "equal", "chosen": "x", "rejected": "x"},
        {"prompt": "2+2?", "chosen": "4", "rejected": "22"},
    ]
    dataset = {"path": write(tmp_path / "pairs.jsonl", rows), "format": "Preference"}
    (data, held_out), config = load(tokenizer, dataset, validation={"fraction": 0.5})
    assert held_out is not None
    assert data.pairs
    assert sorted(texts(data, tokenizer) + texts(held_out, tokenizer)) == [["2", "eleven"], ["4", "22"]]
    (data, _), config = load(tokenizer, dataset)
    input_ids, labels, lengths = data.batch([1, 0])
    assert input_ids.shape == labels.shape == (1, sum(lengths))
    assert lengths == [len(sample.input_ids) for row in (1, 0) for sample in data.samples(row)]
    assert data.lengths.tolist() == [sum(lengths[2:]), sum(lengths[:2])]
    assert "3 pairs; " in describe(data, config)
    assert "1 left out, because nothing in them carries the loss" in describe(data, config)


def test_a_rank_without_a_pair_gets_two_ignored_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    (data, _), _ = load(tokenizer, {"path": write(tmp_path / "x.jsonl", rows), "format": "Preference"})
    _, labels, lengths = data.batch([])
    assert labels.tolist() == [[IGNORE, IGNORE]]
    assert lengths == [1, 1]


# --- packed sequences ---


def test_packed_rows_hold_every_document_once_with_its_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = {"path": write(tmp_path / "sums.jsonl", SUMS), "format": "Instruct", "max_sequence_length": 128}
    (apart, _), _ = load(tokenizer, dataset)
    (packed, _), config = load(tokenizer, dataset | {"packed": True})
    assert packed.lengths.max() <= 128
    assert packed.lengths.sum() == apart.lengths.sum()
    assert packed.label_counts.sum() == apart.label_counts.sum()
    assert sorted(chain(*texts(packed, tokenizer))) == sorted(chain(*texts(apart, tokenizer)))
    _, labels, lengths = packed.batch([0])
    assert lengths == [len(sample.input_ids) for sample in packed.samples(0)]
    assert np.count_nonzero(labels.numpy() != IGNORE) == packed.label_counts[0]
    assert f"packed into {len(packed)} sequences that are " in describe(packed, config)


def test_a_small_dataset_with_half_a_weight_gives_half_of_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Packed into a single sequence, it could be taken whole or not at all."""
    dataset = {"path": write(tmp_path / "sums.jsonl", SUMS), "format": "Instruct", "packed": True, "weight": 0.5}
    (data, _), _ = load(tokenizer, dataset)
    (share,) = data.shares
    assert share.count / (share.stop - share.first) == pytest.approx(0.5, abs=0.05)
    assert data.lengths.max() / data.lengths.sum() < 0.1
