"""Batches: padding, and which rank trains on which row in which step."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kubetune_trainer.data import Sample, Sampler, collate, deal
from kubetune_trainer.model import IGNORE


def sample(*labels: int) -> Sample:
    return Sample(np.arange(len(labels), dtype=np.int32), np.array(labels, dtype=np.int32))


def test_a_batch_is_its_samples_end_to_end() -> None:
    input_ids, labels, lengths = collate([sample(7), sample(IGNORE, 8, 9)])
    assert input_ids.tolist() == [[0, 0, 1, 2]]
    assert labels.tolist() == [[7, IGNORE, 8, 9]]
    assert lengths == [1, 3]
    assert (input_ids.dtype, labels.dtype) == (torch.int64, torch.int64)


def test_a_rank_without_a_row_gets_one_ignored_token() -> None:
    input_ids, labels, lengths = collate([])
    assert input_ids.shape == labels.shape == (1, 1)
    assert labels.item() == IGNORE
    assert lengths == [1]


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
