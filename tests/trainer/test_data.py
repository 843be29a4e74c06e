"""Rows to tokens and masks (oracle: transformers), refusals with file, line and reason, which rank trains on what."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubetune_contract.dataset import DatasetConfig, ValidationConfig
from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer.cache import cache_folder
from kubetune_trainer.data import Dataset, Sample, arrange, describe, load_parts, load_questions, validation_source
from kubetune_trainer.model import IGNORE
from kubetune_trainer.rows import DataError
from kubetune_trainer.tokenizer import Message, Tokenizer

CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """\
{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
INST = """\
{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
FORGETFUL = CHATML.replace("m.content +", "(m.content if loop.last or m.role == 'user' else '(omitted)') +")
THINKING = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
CAPITALS: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "Lima. 🙂"},
]
NextFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(chat_folder: NextFolder) -> Tokenizer:
    return Tokenizer.from_folder(chat_folder())


def write_rows(folder: Path, *conversations: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(c if isinstance(c, dict) else {"messages": c}) + "\n" for c in conversations))
    return path


def load(path: Path, tokenizer: Tokenizer, **options: Any) -> Dataset:
    return load_config(DatasetConfig(path=str(path), **options), tokenizer)


def load_config(config: DatasetConfig, tokenizer: Tokenizer) -> Dataset:
    return arrange(load_parts(config, tokenizer, cache_folder(Path()), {}), config, config.packed)


def only(dataset: Dataset) -> Sample:
    """The one document of the one row."""
    assert len(dataset) == 1
    (sample,) = dataset.samples(0)
    return sample


def learnt(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """The runs of tokens that carry the loss, as text with special tokens."""
    runs, current = [], []
    for label in [*sample.labels.tolist(), IGNORE]:
        if label != IGNORE:
            current.append(label)
        elif current:
            runs.append(tokenizer._backend.decode(current, skip_special_tokens=False))
            current = []
    return runs


# --- the mask ---

MASKS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "ChatML: each answer with its end of turn, not the line break after it": (
        CHATML,
        {},
        ["Paris.<|im_end|>", "Lima. 🙂<|im_end|>"],
    ),
    "Llama 3": (LLAMA3, {}, ["Paris.<|eot_id|>", "Lima. 🙂<|eot_id|>"]),
    "a template without generation prompt": (INST, {"eos_token": "</s>"}, [" Paris.</s>", " Lima. 🙂</s>"]),
    "a template without end of turn": (INST.replace("{{ eos_token }}", ""), {}, [" Paris.", " Lima. 🙂"]),
}


@pytest.mark.parametrize("case", MASKS)
def test_the_loss_is_on_the_answers(case: str, chat_folder: NextFolder, tmp_path: Path) -> None:
    template, config, expected = MASKS[case]
    tokenizer = Tokenizer.from_folder(chat_folder(template, **config))
    sample = only(load(write_rows(tmp_path, CAPITALS), tokenizer))
    assert learnt(sample, tokenizer) == expected


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("Assistant", ["Paris.<|im_end|>", "Lima. 🙂<|im_end|>"]),
        ("Last", ["Lima. 🙂<|im_end|>"]),
    ],
)
def test_train_on(train_on: str, expected: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    sample = only(load(write_rows(tmp_path, CAPITALS), tokenizer, train_on=train_on))
    assert learnt(sample, tokenizer) == expected


def test_train_on_all_learns_every_token_but_the_first(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sample = only(load(write_rows(tmp_path, CAPITALS), tokenizer, train_on="All"))
    ids = tokenizer.encode(tokenizer.render(CAPITALS))
    assert sample.input_ids.tolist() == ids[:-1]
    assert sample.labels.tolist() == ids[1:]


def test_labels_are_the_next_tokens_and_end_the_sample(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sample = only(load(write_rows(tmp_path, [*CAPITALS, {"role": "user", "content": "Thanks!"}]), tokenizer))
    ids = tokenizer.encode(tokenizer.render(CAPITALS))
    length = len(sample.input_ids)
    assert sample.input_ids.tolist() == ids[:length]
    marked = sample.labels != IGNORE
    assert (sample.labels[marked] == np.array(ids[1 : length + 1])[marked]).all()
    assert sample.labels[-1] == tokenizer.encode("<|im_end|>")[0]


def test_an_empty_answer_is_its_end_of_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = [{"role": "user", "content": "Be silent."}, {"role": "assistant", "content": ""}]
    sample = only(load(write_rows(tmp_path, row), tokenizer))
    assert learnt(sample, tokenizer) == ["<|im_end|>"]


def test_an_answer_that_starts_with_white_space_keeps_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = [{"role": "user", "content": "?"}, {"role": "assistant", "content": " Lima."}]
    sample = only(load(write_rows(tmp_path, row), tokenizer))
    assert learnt(sample, tokenizer) == [" Lima.<|im_end|>"]


ANSWERS = st.text(min_size=1, max_size=12).filter(lambda text: not text[0].isspace())
"""White space at the start may merge with the line break before it into one token, which is then half the prompt's."""


@settings(deadline=None, max_examples=50)  # each example waits for the disk
@given(turns=st.lists(st.tuples(st.text(max_size=12), ANSWERS), min_size=1, max_size=3))
def test_any_text_is_masked_as_if_its_answers_were_tokenized_apart(
    turns: list[tuple[str, str]], tokenizer: Tokenizer
) -> None:
    row = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in turns]
    with TemporaryDirectory() as folder:
        sample = only(load(write_rows(Path(folder), list(chain(*row))), tokenizer))
    expected = chain(*(tokenizer.encode(f"{answer}<|im_end|>") for _, answer in turns))
    assert sample.labels[sample.labels != IGNORE].tolist() == list(expected)


def test_a_real_tokenizer_is_masked_alike(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(smollm2)
    sample = only(load(write_rows(tmp_path, CAPITALS), tokenizer))
    assert learnt(sample, tokenizer) == ["Paris.<|im_end|>", "Lima. 🙂<|im_end|>"]


# --- refusals ---

GOOD = json.dumps({"messages": CAPITALS})
BAD_ROWS = {
    "not JSON": ('{"messages": [', "not JSON ("),
    "not an object": ("[]", "not an object with the columns as its keys"),
    "no messages": ('{"text": "hello"}', '"messages" must be a list with at least one message'),
    "an empty conversation": ('{"messages": []}', '"messages" must be a list with at least one message'),
    "a message that is a text": ('{"messages": ["hello"]}', 'message 1 must be an object with "role" and "content"'),
    "a role of another format": (
        '{"messages": [{"role": "human", "content": "hi"}]}',
        "message 1 has the role 'human'; the roles are system, user, assistant",
    ),
    "no content": ('{"messages": [{"role": "user"}]}', 'message 1: "content" must be a text'),
    "content in parts": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text"}]}]}',
        'message 2: "content" must be a text',
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_told_with_file_line_and_reason(case: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    row, reason = BAD_ROWS[case]
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n\n{row}\n{GOOD}\n")
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    assert str(caught.value).startswith(f"1 row cannot be used: {path}: line 3: {reason}")
    assert caught.value.exit_code == ExitCode.INVALID_DATA


def test_the_first_ten_bad_rows_are_told_at_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n" * 12)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    text = str(caught.value)
    assert text.startswith(f"12 rows cannot be used: {path}: line 1: ")
    assert text.count("line ") == 10
    assert text.endswith("; and 2 more")


def test_bytes_that_are_no_text_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        load(path, tokenizer)


def test_extra_keys_and_line_separators_inside_texts_are_no_problem(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a\u2028b", "weight": 1},
        {"role": "assistant", "content": "c", "name": "x"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages, "id": 7}, ensure_ascii=False) + "\r\n")
    assert len(load(path, tokenizer)) == 1


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_told(content: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        load(path, tokenizer)


def test_a_missing_file_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read: No such file or directory"):
        load(tmp_path / "none.jsonl", tokenizer)


@pytest.mark.parametrize("template", [FORGETFUL, THINKING], ids=["forgets answers", "adds to the generation prompt"])
def test_a_template_without_the_prefix_property_is_told(template: str, chat_folder: NextFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(chat_folder(template))
    with pytest.raises(
        DataError, match=r"line 1: the model's chat template renders the messages before message 3 differently"
    ):
        load(write_rows(tmp_path, CAPITALS), tokenizer)


def test_a_conversation_that_the_template_refuses_is_told(chat_folder: NextFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(chat_folder("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(
        DataError, match="line 1: the model's chat template refuses the conversation: roles must alternate"
    ):
        load(write_rows(tmp_path, CAPITALS), tokenizer)


def test_data_without_answers_are_told_before_anything_is_trained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no assistant message, so there is nothing to learn: add answers, or set"):
        load(write_rows(tmp_path, CAPITALS[:2]), tokenizer)


def test_answers_that_are_all_cut_off_are_told_with_the_length_that_would_do(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    row = [{"role": "user", "content": "fig " * 30}, {"role": "assistant", "content": "pear"}]
    longest = len(tokenizer.encode(tokenizer.render(row)))
    with pytest.raises(
        DataError, match=rf"max_sequence_length 16 cuts off every answer.*the longest conversation has {longest} tokens"
    ):
        load(write_rows(tmp_path, row), tokenizer, max_sequence_length=16)


def test_rows_that_teach_nothing_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = load(write_rows(tmp_path, CAPITALS, CAPITALS[:2], CAPITALS), tokenizer)
    assert len(dataset) == 2
    config = DatasetConfig(path="unused")
    assert "3 conversations; " in describe(dataset, config)
    assert "1 left out, because nothing in them carries the loss" in describe(dataset, config)


def test_long_conversations_are_cut_at_the_end_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path, CAPITALS, CAPITALS[1:3])
    whole = load(path, tokenizer)
    cut = int(whole.lengths[0]) - 3
    dataset = load(path, tokenizer, max_sequence_length=cut)
    config = DatasetConfig(path=str(path), max_sequence_length=cut)
    assert f"1 cut to {cut} tokens (dataset.max_sequence_length)" in describe(dataset, config)
    (first,), (second,) = dataset.samples(0), dataset.samples(1)
    assert len(first.input_ids) == cut - 1  # the last token has no target any more
    assert first.labels.tolist() == whole.samples(0)[0].labels.tolist()[: cut - 1]
    assert second.labels.tolist() == whole.samples(1)[0].labels.tolist()


# --- held-out data ---


def test_validation_is_read_with_the_options_of_the_training_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path, CAPITALS)
    training = DatasetConfig(path="elsewhere", train_on="Last")
    held_out = load_config(validation_source(ValidationConfig(path=str(path)), training), tokenizer)
    assert learnt(only(held_out), tokenizer) == ["Lima. 🙂<|im_end|>"]


def test_questions_end_before_the_last_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path, CAPITALS, CAPITALS[:2], CAPITALS[1:3], CAPITALS)
    config = DatasetConfig(path=str(path))
    first, second = load_questions(load_parts(config, tokenizer, cache_folder(Path()), {}), 2, config, tokenizer)
    assert (first.text, first.reference) == ("And of Peru?", "Lima. 🙂")
    assert first.rendered == tokenizer.render(CAPITALS[:4], add_generation_prompt=True)
    assert (second.text, second.reference) == ("What is the capital of France?", "Paris.")
