"""Tokenized documents on disk, read through memory maps: as many as the disk holds, and ready when they are opened.

A folder has: `ids.bin` (int32) and `carries.bin` (uint8, whether the token carries the loss) with the documents one
after another, an array of their bounds and one each of their label counts and rows, and `meta.json`, written last.
"""

import json
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from kubetune_trainer.formats import Formatter, Rendered
from kubetune_trainer.rows import RowError, place, read_rows
from kubetune_trainer.tokenizer import Tokenizer

META_FILE: Final = "meta.json"
SHOWN_PROBLEMS: Final = 10
_BATCH: Final = 512
"""Rows that are tokenized together."""
_SECONDS_BETWEEN_NEWS: Final = 15.0


@dataclass
class Counts:
    """What became of the rows."""

    files: list[str]
    """Names of the files, below the dataset's path."""
    rows: int = 0
    """Rows that could be read."""
    truncated: int = 0
    """Rows longer than max_sequence_length."""
    unlabelled: int = 0
    """Rows left out because none of their tokens carries the loss."""
    bad: int = 0
    """Rows left out because they are malformed."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """File and reason of the first bad rows."""
    answers: bool = False
    """Whether any row has a part that should carry the loss."""
    longest: int = 0
    """Tokens of the longest row before it was cut."""


@dataclass(frozen=True)
class Tokenized:
    """The documents of one dataset. Document d has ids[bounds[d]:bounds[d + 1]], one more than its sequence:

    position i of the sequence is ids[i], its target is ids[i + 1] where carries[i + 1].
    """

    counts: Counts
    ids: npt.NDArray[np.int32]
    carries: npt.NDArray[np.uint8]
    bounds: npt.NDArray[np.int64]
    """[documents + 1]"""
    label_counts: npt.NDArray[np.int32]
    """Tokens of each document that carry the loss. [documents]"""
    rows: npt.NDArray[np.int64]
    """Number of each document's file, and of its row there. [documents, 2]"""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document's sequence. [documents]"""
        return (np.diff(self.bounds) - 1).astype(np.int32)

    @classmethod
    def open(cls, folder: Path) -> "Tokenized":
        """Maps a folder that write_tokenized() has filled."""
        values = json.loads((folder / META_FILE).read_bytes())
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("bounds", "label_counts", "rows")]
        if values["empty"]:  # an empty file cannot be mapped
            return cls(Counts(**values["counts"]), np.empty(0, np.int32), np.empty(0, np.uint8), *arrays)
        ids: npt.NDArray[np.int32] = np.memmap(folder / "ids.bin", np.int32, mode="r")
        carries: npt.NDArray[np.uint8] = np.memmap(folder / "carries.bin", np.uint8, mode="r")
        return cls(Counts(**values["counts"]), ids, carries, *arrays)


class Source:
    """Where the rows of a dataset stand."""

    def __init__(self, name: str, files: list[Path], names: list[str]) -> None:
        self.name = name
        """What people call it: a path or a repository."""
        self.files = files
        self.names = names
        """Of each file, below `name`."""


def write_tokenized(folder: Path, source: Source, formatter: Formatter, tokenizer: Tokenizer, cut: int) -> Counts:
    """Renders and tokenizes all rows into an empty folder; `cut` is the most tokens of a document.

    Raises DataError for a file that cannot be read. Bad rows are counted and left out.
    """
    counts = Counts(source.names)
    turn_ends = turn_ends_of(formatter, tokenizer)
    with (folder / "ids.bin").open("wb") as ids, (folder / "carries.bin").open("wb") as carries:
        writer = _Writer(ids, carries, turn_ends, cut, counts)
        rendered = _rendered(source, formatter, counts)
        while batch := list(islice(rendered, _BATCH)):
            encodings = iter(tokenizer.encode_batch([side.text for _, sides in batch for side in sides]))
            for row, sides in batch:
                writer.add(row, [(next(encodings), side.spans) for side in sides])
        for stream in (ids, carries):
            stream.flush()
            os.fsync(stream.fileno())
    np.save(folder / "bounds.npy", np.frombuffer(writer.bounds, dtype=np.int64))
    np.save(folder / "label_counts.npy", np.frombuffer(writer.label_counts, dtype=np.int32))
    np.save(folder / "rows.npy", np.frombuffer(writer.rows, dtype=np.int64).reshape(-1, 2))
    values = {"counts": asdict(counts), "empty": len(writer.label_counts) == 0}
    (folder / META_FILE).write_text(json.dumps(values))
    return counts


def turn_ends_of(formatter: Formatter, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens with which a part that carries the loss ends; none where everything carries it."""
    whole = formatter.train_on == "All" or formatter.options.format == "Completion"
    return frozenset() if whole else tokenizer.special_ids


def _rendered(source: Source, formatter: Formatter, counts: Counts) -> Iterator[tuple[tuple[int, int], list[Rendered]]]:
    """(file, row) numbers and texts of each good row; bad ones are counted."""
    told = time.monotonic()
    for number, file in enumerate(source.files):
        for row_number, row in read_rows(file, formatter.columns):
            try:
                if isinstance(row, RowError):
                    raise row
                sides = formatter.render(row)
            except RowError as error:
                counts.bad += 1
                if counts.bad <= SHOWN_PROBLEMS:
                    counts.problems.append((source.names[number], f"{place(file, row_number)}: {error}"))
                continue
            counts.rows += 1
            if time.monotonic() - told > _SECONDS_BETWEEN_NEWS:
                told = time.monotonic()
                print(f"tokenizing  {source.name}: {counts.rows:,} rows so far", flush=True)
            yield (number, row_number), sides


class _Writer:
    """Appends documents to the streams and keeps their index."""

    def __init__(self, ids: IO[bytes], carries: IO[bytes], turn_ends: frozenset[int], cut: int, counts: Counts) -> None:
        self._ids = ids
        self._carries = carries
        self._turn_ends = turn_ends
        self._cut = cut
        self._counts = counts
        self.bounds = array("q", [0])
        self.label_counts = array("i")
        self.rows = array("q")

    def add(self, row: tuple[int, int], sides: Sequence[tuple[Any, list[tuple[int, int]]]]) -> None:
        """A row's documents, unless one of them has nothing that carries the loss."""
        counts, longest = self._counts, max(len(encoding.ids) for encoding, _ in sides)
        counts.longest = max(counts.longest, longest)
        counts.truncated += longest > self._cut
        counts.answers |= all(spans for _, spans in sides)
        documents = [cut_document(encoding, spans, self._turn_ends, self._cut) for encoding, spans in sides]
        if not all(np.any(carries) for _, carries in documents):
            counts.unlabelled += 1
            return
        for ids, carries in documents:
            self._ids.write(ids.tobytes())
            self._carries.write(carries.tobytes())
            self.bounds.append(self.bounds[-1] + len(ids))
            self.label_counts.append(int(np.count_nonzero(carries)))
            self.rows.extend(row)


def cut_document(
    encoding: Any, spans: list[tuple[int, int]], turn_ends: frozenset[int], cut: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """The tokens up to the last one that carries the loss, and whether each does.

    Under causal attention later tokens change no loss. The first is nobody's target.
    """
    encoding_ids = encoding.ids  # each access makes a list anew
    ids = np.array(encoding_ids, dtype=np.int32)
    starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
    carries = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        first, end = np.searchsorted(starts, (start, stop))
        # An answer ends with its end-of-turn token; what the template writes after it (a line break) is not part of it.
        last = next((i for i in range(end - 1, first - 1, -1) if encoding_ids[i] in turn_ends), end - 1)
        carries[first : last + 1] = True
    carries[:1] = False
    carries = carries[:cut]
    length = int(np.flatnonzero(carries)[-1]) + 1 if carries.any() else 0
    return ids[:length], carries[:length]
