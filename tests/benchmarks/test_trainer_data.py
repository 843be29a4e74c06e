"""The rows of the data's benchmark are what its page says of them; the runs are `python -m benchmarks.trainer.data`."""

import json

import numpy as np
import pytest
from benchmarks.trainer import conversations

from kubetune_trainer.tokenizer import Tokenizer

LENGTHS = conversations.draw_lengths(2_000, 300, 2048)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return conversations.marked(conversations.inputs.SMOLLM2, tmp_path_factory.mktemp("marked"))


def test_lengths_are_spread_around_their_median_and_cut_at_the_longest():
    assert np.median(LENGTHS) == pytest.approx(300, rel=0.1)
    assert LENGTHS.max() == 2048
    assert LENGTHS.min() >= conversations.SHORTEST
    assert (LENGTHS == 2048).mean() < 0.05


def test_a_part_of_an_epoch_is_as_long_and_as_padded_as_the_whole():
    part = conversations.like(LENGTHS, 16)
    assert part.mean() == pytest.approx(LENGTHS.mean(), rel=0.05)
    padded = [lengths.reshape(-1, 8).max(axis=1).mean() / lengths.mean() for lengths in (part, LENGTHS)]
    assert padded[0] == pytest.approx(padded[1], rel=0.05)


def test_the_same_seed_gives_the_same_file(tmp_path):
    first, second, other = (
        conversations.write(tmp_path / f"{number}.jsonl", LENGTHS[:50], seed).read_bytes()
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == second != other


def test_conversations_are_about_as_long_as_was_drawn(marked):
    tokenizer, drawn = Tokenizer.from_folder(marked), LENGTHS[LENGTHS > 100][:100]
    texts = [tokenizer.render(row["messages"]) for row in conversations.conversations(drawn)]
    found = [len(tokenizer.encode(text)) for text in texts]
    assert np.mean(found) == pytest.approx(drawn.mean(), rel=0.25)
    assert np.corrcoef(found, drawn)[0, 1] > 0.95


def test_the_marks_of_the_answers_do_not_change_the_text(marked):
    with_marks = Tokenizer.from_folder(marked)
    plain = Tokenizer.from_folder(conversations.inputs.model(conversations.inputs.SMOLLM2))
    for row in conversations.conversations(LENGTHS[:20]):
        assert with_marks.render(row["messages"]) == plain.render(row["messages"])


def test_each_conversation_ends_with_an_answer(tmp_path):
    rows = conversations.write(tmp_path / "rows.jsonl", LENGTHS[:200]).read_text().splitlines()
    turns = [[turn["role"] for turn in json.loads(row)["messages"]] for row in rows]
    assert all(roles == ["user", "assistant"] * (len(roles) // 2) for roles in turns)
    assert {len(roles) for roles in turns} == {2, 4, 6}
