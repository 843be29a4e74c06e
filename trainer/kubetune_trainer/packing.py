"""Which documents share a row: best-fit decreasing (Johnson 1973), done for all documents of one length at once.

Documents are placed by falling length, each into the fullest row that still has room for it. The fullest row that takes
one document of a length stays the fullest until it takes no more of them, so whole groups of rows are filled together.
"""

from collections import defaultdict

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.int32], capacity: int) -> tuple[Rows, Rows]:
    """(documents, bounds): row r holds documents[bounds[r] : bounds[r + 1]]. Each document is in one row.

    `lengths`: tokens of each document, at most `capacity`, the tokens of a row. The same input gives the same rows.
    """
    by_length = np.argsort(-lengths, kind="stable")
    distinct, starts = np.unique(-lengths[by_length], return_index=True)
    stops = [*starts[1:].tolist(), len(lengths)]
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = _Rows(capacity)
    for length, start, stop in zip((-distinct).tolist(), starts.tolist(), stops, strict=True):
        row_of[by_length[start:stop]] = rows.place(max(1, length), stop - start)
    documents = np.argsort(row_of, kind="stable")
    sizes = np.bincount(row_of, minlength=rows.count)
    return documents, np.concatenate(([0], np.cumsum(sizes)))


class _Rows:
    """Rows by the space that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self._capacity = capacity
        self._by_space: defaultdict[int, list[int]] = defaultdict(list)
        self._spaces = 0
        """Bit s is set where a row has s tokens left."""

    def place(self, length: int, count: int) -> Rows:
        """The rows of `count` documents of a length that is not above any length placed before."""
        placed: list[Rows] = []
        while count:
            space = self._best_space(length)
            each = space // length
            found = self._take(space, -(-count // each))
            filled = np.repeat(np.array(found, dtype=np.int64), each)[:count]
            placed.append(filled)
            count -= len(filled)
            last = len(filled) - each * (len(found) - 1)
            self._put(found[:-1], space - each * length)
            self._put(found[-1:], space - last * length)
        return np.concatenate(placed)

    def _best_space(self, length: int) -> int:
        fitting = self._spaces >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else self._capacity

    def _take(self, space: int, most: int) -> list[int]:
        """Up to `most` rows with this space; new ones where there are none."""
        known = self._by_space.get(space)
        if known is None:
            assert space == self._capacity, "only new rows are empty"
            self.count += most
            return list(range(self.count - most, self.count))
        found = known[:most]
        del known[:most]
        if not known:
            del self._by_space[space]
            self._spaces &= ~(1 << space)
        return found

    def _put(self, rows: list[int], space: int) -> None:
        if rows and space:
            self._by_space[space] += rows
            self._spaces |= 1 << space
