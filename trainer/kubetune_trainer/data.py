"""The data side: rows to samples, and which rows make up which step.

The loss mask comes from rendered text: the conversation up to an answer (with the generation prompt) must be a prefix
of the whole, so the answer is what follows it. The whole is tokenized once; offsets say which tokens lie in an answer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import numpy.typing as npt
import torch

from kubetune_contract.dataset import DatasetConfig, ValidationConfig
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_trainer.model import IGNORE
from kubetune_trainer.tokenizer import Message, Tokenizer

Tokens = npt.NDArray[np.int32]

ROLES: Final = ("system", "user", "assistant")
_SHOWN_PROBLEMS: Final = 10


class DataError(JobError):
    """The data file cannot be trained on. Names the file, the lines and the reasons."""

    exit_code = ExitCode.INVALID_DATA


class _RowError(Exception):
    """Why one row cannot be used."""


# --- rows to samples -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One sequence. `labels[i]` is the target of position i (already shifted) or IGNORE.

    It ends with its last label: under causal attention later positions change no loss.
    """

    input_ids: Tokens
    """[sequence]"""
    labels: Tokens
    """[sequence]"""


@dataclass(frozen=True)
class Dataset:
    """All samples of a file and what became of its rows."""

    samples: list[Sample]
    rows: int
    """Conversations in the file."""
    truncated: int
    """Conversations longer than max_sequence_length."""
    unlabelled: int
    """Conversations left out because none of their tokens carries the loss."""

    @cached_property
    def lengths(self) -> Tokens:
        """Tokens of each sample. [samples]"""
        return np.array([len(sample.input_ids) for sample in self.samples], dtype=np.int32)

    @cached_property
    def label_counts(self) -> Tokens:
        """Tokens of each sample that carry the loss. [samples]"""
        return np.array([np.count_nonzero(sample.labels != IGNORE) for sample in self.samples], dtype=np.int32)


@dataclass(frozen=True)
class Prompt:
    """A held-out question."""

    messages: list[Message]
    """The conversation up to the answer."""
    text: str
    """Its last turn, for people."""
    reference: str
    """The answer in the data."""


def load_dataset(options: DatasetConfig, tokenizer: Tokenizer) -> Dataset:
    """Reads, renders and tokenizes the file.

    Raises DataError for a file, row or template that cannot be used, and where no token would carry the loss.
    """
    rendered = _render_all(options, tokenizer)
    encodings = tokenizer.encode_batch([text for text, _ in rendered])
    turn_ends = frozenset[int]() if options.train_on == "All" else tokenizer.special_ids
    cut = options.max_sequence_length
    pairs = zip(encodings, rendered, strict=True)
    samples = [_sample(encoding, spans, turn_ends, cut) for encoding, (_, spans) in pairs]
    kept = [sample for sample in samples if sample is not None]
    lengths = [len(encoding.ids) for encoding in encodings]
    if not kept:
        raise DataError(_nothing_to_learn(options, any(spans for _, spans in rendered), max(lengths)))
    truncated = sum(length > cut for length in lengths)
    return Dataset(kept, rows=len(samples), truncated=truncated, unlabelled=len(samples) - len(kept))


def load_validation(validation: ValidationConfig, training: DatasetConfig, tokenizer: Tokenizer) -> Dataset:
    """The held-out file, read with the options of the training data."""
    return load_dataset(training.model_copy(update={"path": validation.path}), tokenizer)


def load_prompts(path: Path, count: int) -> list[Prompt]:
    """The first `count` conversations of a file that have an answer, each up to its last answer."""
    prompts: list[Prompt] = []
    for _, messages in _read_rows(path):
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        if answers and len(prompts) < count:
            last = answers[-1]
            prompts.append(Prompt(messages[:last], messages[last - 1]["content"], messages[last]["content"]))
    return prompts


def digest_data(path: Path) -> str:
    """SHA-256 of a data file. Raises DataError where it cannot be read."""
    return sha256(_read_bytes(path)).hexdigest()


def collate(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """input_ids and labels, int64 [1, sequence], of the samples end to end, and the length of each.

    No sample gives one ignored token: a rank without a row must run the same forward passes as its peers.
    """
    if not samples:
        return torch.zeros((1, 1), dtype=torch.int64), torch.full((1, 1), IGNORE), [1]
    input_ids = np.concatenate([sample.input_ids for sample in samples], dtype=np.int64)
    labels = np.concatenate([sample.labels for sample in samples], dtype=np.int64)
    lengths = [len(sample.input_ids) for sample in samples]
    return torch.from_numpy(input_ids)[None], torch.from_numpy(labels)[None], lengths


def _read_rows(path: Path) -> list[tuple[int, list[Message]]]:
    """(line number, conversation) of each row that is not blank."""
    rows, problems = [], []
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, _messages(line)))
        except _RowError as error:
            problems.append(f"line {number}: {error}")
    _refuse(path, problems)
    if not rows:
        raise DataError(
            f'{path} has no rows: each line must be a conversation, {{"messages": [{{"role": ..., "content": ...}}]}}'
        )
    return rows


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        count = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
        raise DataError(f"{path}: {count} cannot be used: " + "; ".join(problems[:_SHOWN_PROBLEMS]) + more)


def _messages(line: bytes) -> list[Message]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise _RowError("not UTF-8") from error
    except ValueError as error:
        raise _RowError(f"not JSON ({error})") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise _RowError('"messages" must be a list with at least one message')
    return [_message(message, number) for number, message in enumerate(messages, start=1)]


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise _RowError(f'message {number} must be an object with "role" and "content"')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _RowError(f"message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _RowError(f'message {number}: "content" must be a text')
    return {"role": role, "content": content}


def _render_all(options: DatasetConfig, tokenizer: Tokenizer) -> list[tuple[str, list[tuple[int, int]]]]:
    path = Path(options.path)
    rendered, problems = [], []
    for line, messages in _read_rows(path):
        try:
            rendered.append(_render_spans(messages, tokenizer, options.train_on))
        except _RowError as error:
            problems.append(f"line {line}: {error}")
    _refuse(path, problems)
    return rendered


def _render_spans(messages: list[Message], tokenizer: Tokenizer, train_on: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the (start, stop) characters of the turns that carry the loss."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        text = tokenizer.render(messages)
        if train_on == "All":
            return text, [(0, len(text))]
        chosen = answers[-1:] if train_on == "Last" else answers
        return text, [_answer_span(messages, turn, text, tokenizer) for turn in chosen]
    except jinja2.TemplateError as error:
        raise _RowError(f"the model's chat template refuses the conversation: {error}") from error


def _answer_span(messages: list[Message], turn: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
    before = tokenizer.render(messages[:turn], add_generation_prompt=True)
    through = text if turn == len(messages) - 1 else tokenizer.render(messages[: turn + 1])
    if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
        raise _RowError(
            f"the model's chat template renders the messages before message {turn + 1} differently once that answer "
            "follows, so the answer's tokens cannot be told apart; train on the last answer or on everything "
            "(dataset.train_on: Last or All), or change the template"
        )
    return len(before), len(through)


def _sample(
    encoding: Any, spans: list[tuple[int, int]], turn_end_ids: frozenset[int], max_length: int
) -> Sample | None:
    """The tokens up to the last one that carries the loss; None where no token does."""
    ids = np.array(encoding.ids, dtype=np.int32)
    starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
    carries = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        first, end = np.searchsorted(starts, (start, stop))
        # An answer ends with its end-of-turn token; what the template writes after it (a line break) is not part of it.
        turn_ends = [i for i in range(first, end) if encoding.ids[i] in turn_end_ids]
        carries[first : turn_ends[-1] + 1 if turn_ends else end] = True
    labels = np.where(carries, ids, IGNORE)[1:max_length]
    labelled = np.flatnonzero(labels != IGNORE)
    if len(labelled) == 0:
        return None
    length = int(labelled[-1]) + 1
    return Sample(ids[:length].copy(), labels[:length].astype(np.int32))


def _nothing_to_learn(options: DatasetConfig, answers: bool, longest: int) -> str:
    if not answers:
        return (
            f"{options.path} has no assistant message, so there is nothing to learn: "
            "add answers, or set dataset.train_on to All"
        )
    return (
        f"{options.path}: dataset.max_sequence_length {options.max_sequence_length} cuts off every answer, so there is "
        f"nothing to learn: raise it (the longest conversation has {longest} tokens) or shorten the prompts"
    )


# --- which rows make up which step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """Which rows a step trains on: a pure function of the step, so that resuming needs no other position.

    The rows of a step do not depend on the number of ranks, only how they are dealt out does.
    """

    lengths: Tokens
    """Tokens of each sample. [samples]"""
    global_batch: int
    """Sequences per optimizer step over all ranks. The last step of an epoch takes what is left."""
    micro_batch: int
    """Most sequences per rank and forward pass."""
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a pass over the data."""
        return -(-len(self.lengths) // self.global_batch)

    def rows(self, step: int) -> Tokens:
        """Indices of the samples of a step (counted from 0 over all epochs)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = (
            _epoch_order(len(self.lengths), self.seed, epoch)
            if self.shuffle
            else np.arange(len(self.lengths), dtype=np.int32)
        )
        return order[within * self.global_batch : (within + 1) * self.global_batch]

    def micro_batches(self, step: int, rank: int, size: int) -> list[list[int]]:
        """The rank's sample indices for each forward pass; every rank has the same number of passes.

        The step's rows are sorted by length, longest first, before they are dealt: neighbours pad each other little and
        ranks that wait for each other have equal work.
        """
        return deal(self.rows(step), self.lengths, self.micro_batch, rank, size)


def deal(rows: Tokens, lengths: Tokens, micro_batch: int, rank: int, size: int) -> list[list[int]]:
    """Rows by falling length in groups of size x micro_batch, each dealt to the ranks in turn.

    The last group may leave a rank without a row.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    cuts = range(0, len(rows) + size * micro_batch, size * micro_batch)
    return [by_length[start:stop][rank::size].tolist() for start, stop in pairwise(cuts) if start < len(rows)]


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tokens:
    # RandomState's streams are frozen (NEP 19): a run resumed under another numpy keeps its order.
    return np.random.RandomState([seed, epoch]).permutation(count).astype(np.int32)
