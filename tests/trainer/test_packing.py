"""Documents in rows: each once, none too long, as full as best-fit decreasing makes them."""

import time
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubetune_trainer.packing import pack

CAPACITY = 2048


def rows_of(lengths: npt.NDArray[np.int32], capacity: int) -> list[list[int]]:
    documents, bounds = pack(lengths, capacity)
    return [documents[start:stop].tolist() for start, stop in pairwise(bounds)]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The sums of the rows, by the textbook: one document after the other, each into the fullest row that has room."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return sorted(rows)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 64))
def test_rows_are_those_of_best_fit_decreasing(values: list[int], capacity: int) -> None:
    lengths = np.array(values, dtype=np.int32)
    rows = rows_of(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(len(values)))
    assert sorted(int(lengths[row].sum()) for row in rows) == best_fit_decreasing(values, capacity)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_the_same_lengths_give_the_same_rows(values: list[int]) -> None:
    lengths = np.array(values, dtype=np.int32)
    first, second = pack(lengths, 32), pack(lengths.copy(), 32)
    assert [array.tolist() for array in first] == [array.tolist() for array in second]


LENGTHS = {
    "conversations": lambda random, count: random.lognormal(5.5, 0.8, count),
    "instructions": lambda random, count: random.gamma(2, 60, count) + 20,
    "short ones": lambda random, count: random.randint(20, 300, count),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_fifty_thousand_realistic_documents_fill_their_rows_in_no_time(case: str) -> None:
    lengths = np.clip(LENGTHS[case](np.random.RandomState(0), 50_000), 10, CAPACITY - 1).astype(np.int32)
    started = time.process_time()
    _, bounds = pack(lengths, CAPACITY)
    seconds = time.process_time() - started
    assert lengths.sum() / ((len(bounds) - 1) * CAPACITY) >= 0.995
    assert seconds < 0.4, "0.1 s on an idle core of 2020; twice the target for one that is shared"
