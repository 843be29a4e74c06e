"""The data of a run: what is trained on, what is held out, and the batches of both.

A row of a Dataset is what a batch counts: one document, several that share a packed sequence, or a pair of a chosen and
a rejected one. Batches are ragged: documents one after another without padding, with the length of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kubetune_contract.config import RunConfig
from kubetune_contract.dataset import DatasetConfig, RowOptions, ValidationConfig
from kubetune_trainer.cache import load_tokenized
from kubetune_trainer.formats import Formatter, Question
from kubetune_trainer.model import IGNORE
from kubetune_trainer.packing import pack
from kubetune_trainer.rows import DataError, RowError, read_rows
from kubetune_trainer.sampling import Share, Tokens
from kubetune_trainer.sources import Commits, Origin, origin_of
from kubetune_trainer.tokenizer import Tokenizer
from kubetune_trainer.tokens import SHOWN_PROBLEMS, Tokenized

Numbers = npt.NDArray[np.int64]

_TRIED_ROWS: Final = 10_000
"""Rows of each dataset among which questions are looked for."""
_FINEST_SHARE: Final = 64
"""Packed rows that a dataset has at least if an epoch takes a part of them, so that the part is about its weight."""


class Batch(NamedTuple):
    """Tokenized one after another."""

    input_ids: torch.Tensor
    """int64 [1, tokens]"""
    labels: torch.Tensor
    """int64 [1, tokens]: the target of each position (already shifted), or IGNORE."""
    lengths: list[int]
    """Tokens of each document; of a pair first the chosen, then the rejected one."""


class Sample(NamedTuple):
    """One document."""

    input_ids: Tokens
    """[sequence]"""
    labels: Tokens
    """[sequence]"""


@dataclass(frozen=True)
class Part:
    """Some documents of one dataset."""

    origin: Origin
    options: RowOptions
    documents: Tokenized
    chosen: Numbers
    """Numbers of the documents, in the order of the files."""


@dataclass(frozen=True)
class Dataset:
    """Rows to train on or to measure."""

    parts: tuple[Part, ...]
    members: Numbers
    """Part and document of each document, row by row. [documents, 2]"""
    bounds: Numbers
    """Row r has members[bounds[r]:bounds[r + 1]]. [rows + 1]"""
    shares: tuple[Share, ...]
    """How much of each part an epoch takes."""
    pairs: bool
    """Whether each row is a chosen and a rejected document."""
    packed: bool

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> Tokens:
        """Tokens of each row. [rows]"""
        return self._per_row([part.documents.lengths for part in self.parts])

    @cached_property
    def label_counts(self) -> Tokens:
        """Tokens of each row that carry the loss. [rows]"""
        return self._per_row([part.documents.label_counts for part in self.parts])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows' documents.

        No row gives ignored tokens: a rank without a row must run the same forward passes as its peers.
        """
        samples = [sample for row in rows for sample in self.samples(row)] or [_NOTHING] * (1 + self.pairs)
        input_ids, labels = (np.concatenate(arrays).astype(np.int64)[None] for arrays in zip(*samples, strict=True))
        lengths = [len(sample.input_ids) for sample in samples]
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), lengths)

    def samples(self, row: int) -> list[Sample]:
        """The documents of a row."""
        found = []
        for part, document in self.members[self.bounds[row] : self.bounds[row + 1]]:
            documents = self.parts[part].documents
            start, stop = documents.bounds[document : document + 2]
            ids, carries = np.array(documents.ids[start:stop]), documents.carries[start:stop]
            found.append(Sample(ids[:-1], np.where(carries[1:], ids[1:], IGNORE).astype(np.int32)))
        return found

    def places(self, rows: Sequence[int]) -> list[str]:
        """Where the rows' documents stand in the data, such as `train.jsonl:12`, each place once."""
        members = [pair for row in rows for pair in self.members[self.bounds[row] : self.bounds[row + 1]]]
        return list(dict.fromkeys(self._place(part, document) for part, document in members))

    def _place(self, part: int, document: int) -> str:
        documents = self.parts[part].documents
        file, row = documents.rows[document]
        return f"{_joined(self.parts[part].origin.name, documents.counts.files[file])}:{row}"

    def _per_row(self, values: list[Tokens]) -> Tokens:
        firsts = np.cumsum([0, *map(len, values)])[:-1]
        each = np.concatenate(values)[firsts[self.members[:, 0]] + self.members[:, 1]]
        return np.add.reduceat(each, self.bounds[:-1]).astype(np.int32)


_NOTHING: Final = Sample(np.zeros(1, dtype=np.int32), np.full(1, IGNORE, dtype=np.int32))


class Data(NamedTuple):
    """What a run reads."""

    training: Dataset
    held_out: Dataset | None


def load_data(config: RunConfig, tokenizer: Tokenizer, cache: Path, commits: Commits) -> Data:
    """Reads, renders and tokenizes what the run needs, or opens what an earlier run has left in `cache`.

    `commits`: what pin() has found. Raises DataError for a file, row or template that cannot be used, and where no
    token would carry the loss.
    """
    options, validation = config.dataset, config.validation
    parts = load_parts(options, tokenizer, cache, commits)
    if validation is None:
        return Data(arrange(parts, options, options.packed), None)
    if validation.fraction is not None:
        parts, apart = hold_out(parts, validation.fraction, config.training.seed)
    else:
        apart = load_parts(validation_source(validation, options), tokenizer, cache, commits)
    return Data(arrange(parts, options, options.packed), arrange(apart, options, packed=False))


def validation_source(validation: ValidationConfig, training: DatasetConfig) -> DatasetConfig:
    """The held-out file, read with the options of the training data."""
    return training.model_copy(update={"path": validation.path, "repo": None, "mixture": [], "weight": 1.0})


def load_parts(options: DatasetConfig, tokenizer: Tokenizer, cache: Path, commits: Commits) -> list[Part]:
    """All datasets of the mixture. Raises DataError where one cannot be used."""
    parts = []
    for source in options.sources:
        origin = origin_of(source, commits)
        documents = load_tokenized(origin, source, options, tokenizer, cache)
        parts.append(Part(origin, source, documents, np.arange(len(documents.label_counts))))
    _refuse_bad_rows(parts, options.max_bad_rows)
    for part in parts:
        _refuse_nothing(part, options)
    return parts


def hold_out(parts: Sequence[Part], fraction: float, seed: int) -> tuple[list[Part], list[Part]]:
    """(training, held out): a part of each dataset drawn from the seed. Raises DataError where one is left empty."""
    kept: list[Part] = []
    apart: list[Part] = []
    for number, part in enumerate(parts):
        width = _width(part)
        rows = len(part.chosen) // width
        count = max(1, round(fraction * rows))
        if count >= rows:
            raise DataError(
                f"{part.origin.name} has {rows} usable rows, of which validation.fraction {fraction} leaves none to "
                "train on: use validation.path, or add data"
            )
        order = np.random.RandomState([seed, number]).permutation(rows)
        for target, chosen in ((apart, order[:count]), (kept, order[count:])):
            documents = np.sort(chosen)[:, None] * width + np.arange(width)
            target.append(Part(part.origin, part.options, part.documents, documents.reshape(-1)))
    return kept, apart


def arrange(parts: Sequence[Part], options: DatasetConfig, packed: bool) -> Dataset:
    """The rows of a dataset: documents, pairs, or packed sequences of documents of one part."""
    members, sizes = [], []
    shares: list[Share] = []
    for number, part in enumerate(parts):
        documents, bounds = _rows(part, options.max_sequence_length, packed)
        members.append(np.stack([np.full(len(documents), number), part.chosen[documents]], axis=1))
        first = shares[-1].stop if shares else 0
        sizes.append(np.diff(bounds))
        shares.append(Share(first, first + len(bounds) - 1, part.options.weight))
    bounds = np.concatenate(([0], np.cumsum(np.concatenate(sizes))))
    return Dataset(tuple(parts), np.concatenate(members), bounds, tuple(shares), options.format == "Preference", packed)


def _rows(part: Part, capacity: int, packed: bool) -> tuple[Numbers, Numbers]:
    count = len(part.chosen)
    if not packed:
        return np.arange(count), np.arange(0, count + 1, _width(part))
    lengths = part.documents.lengths[part.chosen]
    if part.options.weight % 1:
        capacity = min(capacity, max(int(lengths.max()), -(-int(lengths.sum()) // _FINEST_SHARE)))
    return pack(lengths, capacity)


def _width(part: Part) -> int:
    return 2 if part.options.format == "Preference" else 1


def load_questions(parts: Sequence[Part], count: int, training: DatasetConfig, tokenizer: Tokenizer) -> list[Question]:
    """The first `count` rows that have an answer, each up to its last answer; only the first rows are tried."""
    questions: list[Question] = []
    for part in parts:
        formatter = Formatter(part.options, training.train_on, tokenizer)
        wanted = {(int(file), int(row)) for file, row in part.documents.rows[part.chosen[:_TRIED_ROWS]]}
        for number, file in enumerate(part.origin.source().files if count else ()):
            for row_number, row in read_rows(file, formatter.columns):
                if len(questions) == count:
                    return questions
                if (number, row_number) in wanted and not isinstance(row, RowError):
                    questions += filter(None, [formatter.question(row)])
    return questions


# --- what is told and refused ---


def describe(data: Dataset, options: DatasetConfig) -> str:
    """What became of the rows, for people."""
    counts = [part.documents.counts for part in data.parts]
    kept, rows = sum(len(part.chosen) for part in data.parts), sum(count.rows for count in counts)
    names = ", ".join(part.origin.name for part in data.parts)
    told = [
        f"{names}: {rows:,} {_NAMES.get(options.format, 'conversations')}",
        f"{data.lengths.sum():,} tokens, {data.label_counts.sum():,} of them carry the loss",
    ]
    if kept < (usable := sum(len(part.documents.label_counts) for part in data.parts)):
        told.insert(1, f"{kept / usable:.0%} of them here (validation.fraction)")
    if truncated := sum(count.truncated for count in counts):
        told.append(f"{truncated:,} cut to {options.max_sequence_length} tokens (dataset.max_sequence_length)")
    if unlabelled := sum(count.unlabelled for count in counts):
        told.append(f"{unlabelled:,} left out, because nothing in them carries the loss")
    if bad := sum(count.bad for count in counts):
        example = _problems(data.parts)[0]
        told.append(f"{bad:,} left out, because they are malformed (dataset.max_bad_rows), such as {example}")
    if data.packed:
        fill = data.lengths.sum() / (len(data) * options.max_sequence_length)
        told.append(f"packed into {len(data):,} sequences that are {fill:.1%} full")
    return "; ".join(told)


_NAMES: Final = {"Completion": "texts", "Preference": "pairs"}
"""What rows are called, where they are not conversations."""


def _joined(name: str, file: str) -> str:
    return f"{name}/{file}" if file else name


def _problems(parts: Sequence[Part]) -> list[str]:
    """The first bad rows, the first of each file with its name."""
    told, last = [], None
    for part in parts:
        for file, reason in part.documents.counts.problems:
            name = _joined(part.origin.name, file)
            told.append(reason if name == last else f"{name}: {reason}")
            last = name
    return told


def _refuse_bad_rows(parts: Sequence[Part], tolerated: int) -> None:
    bad = [part for part in parts if part.documents.counts.bad]
    count = sum(part.documents.counts.bad for part in bad)
    if count <= tolerated:
        return
    problems = _problems(bad)
    more = f"; and {count - SHOWN_PROBLEMS} more" if count > SHOWN_PROBLEMS else ""
    rows = "1 row" if count == 1 else f"{count} rows"
    allowed = f", but dataset.max_bad_rows is {tolerated}" if tolerated else ""
    raise DataError(f"{rows} cannot be used{allowed}: " + "; ".join(problems[:SHOWN_PROBLEMS]) + more)


def _refuse_nothing(part: Part, options: DatasetConfig) -> None:
    counts, name = part.documents.counts, part.origin.name
    if len(part.documents.label_counts):
        return
    if not counts.rows:
        raise DataError(f"{name} has no rows{f' but {counts.bad} malformed ones' if counts.bad else ''}")
    if not counts.answers:
        raise DataError(
            f"{name} has no assistant message, so there is nothing to learn: "
            "add answers, or set dataset.train_on to All"
        )
    raise DataError(
        f"{name}: dataset.max_sequence_length {options.max_sequence_length} cuts off every answer, so there is "
        f"nothing to learn: raise it (the longest conversation has {counts.longest} tokens) or shorten the prompts"
    )
