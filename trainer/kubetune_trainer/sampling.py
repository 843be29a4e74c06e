"""Which rows make up which step: a pure function of the seed and the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Share:
    """What an epoch takes of the rows `first` to `stop - 1`."""

    first: int
    stop: int
    weight: float = 1.0
    """Passes over these rows in an epoch."""

    @property
    def whole(self) -> int:
        """Passes over all of the rows."""
        return int(self.weight)

    @property
    def drawn(self) -> int:
        """Rows of the random part of the rows that is taken besides; at least one row is taken in all."""
        part = round((self.weight - self.whole) * (self.stop - self.first))
        return part or int(self.whole == 0)

    @property
    def count(self) -> int:
        """Rows in an epoch."""
        return self.whole * (self.stop - self.first) + self.drawn


@dataclass(frozen=True)
class Sampler:
    """Which rows a step trains on: a pure function of the step, so that resuming needs no other position.

    The rows of a step do not depend on the number of ranks, only how they are dealt out does.
    """

    lengths: Tokens
    """Tokens of each row. [rows]"""
    global_batch: int
    """Rows per optimizer step over all ranks. The last step of an epoch takes what is left."""
    micro_batch: int
    """Most rows per rank and forward pass."""
    seed: int
    shuffle: bool
    shares: tuple[Share, ...] = ()
    """How much of which rows an epoch takes; () takes every row once."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows in an epoch, those that come twice counted twice."""
        return sum(share.count for share in self._shares)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a pass over the data."""
        return -(-self.rows_per_epoch // self.global_batch)

    def rows(self, step: int) -> Tokens:
        """Numbers of the rows of a step (counted from 0 over all epochs)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self._shares, self.seed, epoch, self.shuffle)
        return order[within * self.global_batch : (within + 1) * self.global_batch]

    def micro_batches(self, step: int, rank: int, size: int) -> list[list[int]]:
        """The rank's rows for each forward pass; every rank has the same number of passes.

        The step's rows are sorted by length, longest first, before they are dealt: ranks that wait for each other have
        equal work.
        """
        return deal(self.rows(step), self.lengths, self.micro_batch, rank, size)

    @property
    def _shares(self) -> tuple[Share, ...]:
        return self.shares or (Share(0, len(self.lengths)),)


def deal(rows: Tokens, lengths: Tokens, micro_batch: int, rank: int, size: int) -> list[list[int]]:
    """Rows by falling length in groups of size x micro_batch, each dealt to the ranks in turn.

    The last group may leave a rank without a row.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    cuts = range(0, len(rows) + size * micro_batch, size * micro_batch)
    return [by_length[start:stop][rank::size].tolist() for start, stop in pairwise(cuts) if start < len(rows)]


@lru_cache(maxsize=2)
def _epoch_order(shares: tuple[Share, ...], seed: int, epoch: int, shuffle: bool) -> Tokens:
    # RandomState's streams are frozen (NEP 19): a run resumed under another numpy keeps its order.
    taken = np.concatenate([_taken(share, [seed, epoch, number]) for number, share in enumerate(shares)])
    return np.random.RandomState([seed, epoch]).permutation(taken) if shuffle else taken


def _taken(share: Share, seed: Sequence[int]) -> Tokens:
    rows = np.arange(share.first, share.stop, dtype=np.int32)
    drawn = np.sort(np.random.RandomState(seed).permutation(rows)[: share.drawn])
    return np.concatenate([*[rows] * share.whole, drawn])
