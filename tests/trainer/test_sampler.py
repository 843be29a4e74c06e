"""Which rank trains on which row in which step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubetune_trainer.sampling import Sampler, Share, deal


def sampler(rows: int, batch: int, micro: int = 1, shuffle: bool = True, seed: int = 1) -> Sampler:
    lengths = np.random.RandomState(0).randint(1, 50, rows).astype(np.int32)
    return Sampler(lengths, global_batch=batch, micro_batch=micro, seed=seed, shuffle=shuffle)


@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 12),
    micro=st.integers(1, 4),
    size=st.integers(1, 5),
    epoch=st.integers(0, 2),
)
def test_every_epoch_has_every_row_once_whatever_the_world(
    rows: int, batch: int, micro: int, size: int, epoch: int
) -> None:
    plan = sampler(rows, batch, micro)
    seen: list[int] = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        dealt = [plan.micro_batches(step, rank, size) for rank in range(size)]
        assert len({len(passes) for passes in dealt}) == 1, "all ranks run the same number of passes"
        assert all(len(rows) <= micro for passes in dealt for rows in passes)
        mine = sorted(row for passes in dealt for rows in passes for row in rows)
        assert mine == sorted(plan.rows(step).tolist()), "the step's rows do not depend on the number of ranks"
        seen += mine
    assert sorted(seen) == list(range(rows))


def test_epochs_differ_when_shuffled_and_a_seed_repeats_them() -> None:
    plan, again, other = sampler(20, 20), sampler(20, 20), sampler(20, 20, seed=2)
    assert plan.rows(0).tolist() == again.rows(0).tolist()
    assert plan.rows(0).tolist() != plan.rows(1).tolist()
    assert plan.rows(0).tolist() != other.rows(0).tolist()


def test_the_order_of_a_seed_is_fixed_for_ever() -> None:
    """A run that is resumed under a newer numpy must go on in the same order."""
    assert sampler(8, 8, seed=42).rows(0).tolist() == [4, 3, 7, 6, 0, 1, 5, 2]


def test_without_shuffle_the_file_is_read_in_order_and_the_last_step_is_short() -> None:
    plan = sampler(7, 3, shuffle=False)
    assert [plan.rows(step).tolist() for step in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]


def test_neighbours_in_length_share_a_pass() -> None:
    lengths = np.array([5, 40, 6, 39], dtype=np.int32)
    rows = np.arange(4, dtype=np.int32)
    assert deal(rows, lengths, micro_batch=2, rank=0, size=1) == [[1, 3], [2, 0]]
    assert [deal(rows, lengths, micro_batch=1, rank=rank, size=2) for rank in (0, 1)] == [[[1], [2]], [[3], [0]]]


# --- mixtures ---

COUNTS = {
    "once": (1.0, 10),
    "a random half": (0.5, 5),
    "twice": (2.0, 20),
    "twice and a random quarter": (2.25, 22),
    "at least one": (0.01, 1),
}


@pytest.mark.parametrize("case", COUNTS)
def test_a_weight_is_the_number_of_passes_over_its_rows(case: str) -> None:
    weight, expected = COUNTS[case]
    lengths = np.ones(15, dtype=np.int32)
    plan = Sampler(lengths, 7, 1, seed=3, shuffle=True, shares=(Share(0, 5), Share(5, 15, weight)))
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        taken = np.concatenate([plan.rows(step) for step in steps])
        counts = np.bincount(taken, minlength=15)
        assert counts[:5].tolist() == [1] * 5
        assert counts[5:].sum() == expected
        assert counts[5:].max() - counts[5:].min() <= 1


def test_each_epoch_draws_another_part_and_a_seed_repeats_them() -> None:
    def draws(seed: int) -> list[list[int]]:
        plan = Sampler(np.ones(40, dtype=np.int32), 20, 1, seed, shuffle=False, shares=(Share(0, 40, 0.5),))
        return [plan.rows(epoch).tolist() for epoch in range(2)]

    first, second = draws(1)
    assert first != second
    assert [first, second] == draws(1)
    assert first != draws(2)[0]
    assert first == sorted(first), "without shuffling the order of the file stays"


def test_an_equal_mixture_is_interleaved_when_it_is_shuffled() -> None:
    shares = (Share(0, 50), Share(50, 100))
    plan = Sampler(np.ones(100, dtype=np.int32), 50, 1, seed=1, shuffle=True, shares=shares)
    assert 10 < np.count_nonzero(plan.rows(0) < 50) < 40
