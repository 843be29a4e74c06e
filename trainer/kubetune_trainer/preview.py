"""What the model will see of the first rows, and which part of it is learnt: for people, before anything is trained."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubetune_contract.config import RunConfig
from kubetune_contract.dataset import DatasetOptions
from kubetune_trainer.formats import Formatter, Rendered
from kubetune_trainer.rows import DataError, RowError, place, read_rows
from kubetune_trainer.sources import origin_of
from kubetune_trainer.tokenizer import Tokenizer
from kubetune_trainer.tokens import cut_document, turn_ends_of

_COLOUR: Final = ("\x1b[32m", "\x1b[0m")
_BRACKETS: Final = ("\u27e6", "\u27e7")
_CUT: Final = "\u2702"


def show(config: RunConfig, count: int = 1, colour: bool = False) -> str:
    """The first `count` rows of each dataset as the model sees them, with what is learnt in brackets or colour.

    Raises JobError for a tokenizer or a file that cannot be used; a bad row is told in its place.
    """
    tokenizer = Tokenizer.from_folder(Path(config.model.path))
    marks = _COLOUR if colour else _BRACKETS
    told = [f"learnt is what stands {'in green' if colour else f'in {marks[0]} {marks[1]}'}"]
    for source in config.dataset.sources:
        formatter = Formatter(source, config.dataset.train_on, tokenizer)
        files = origin_of(source, {}).source().files
        rows = (entry for file in files for entry in _rows(file, formatter))
        shown = list(islice(rows, count))
        if not shown:
            raise DataError(f"{source.path or source.repo} has no rows")
        for head, sides in shown:
            if isinstance(sides, RowError):
                told.append(f"--- {head} cannot be used: {sides}")
                continue
            texts = [_marked(side, config.dataset, formatter, tokenizer, marks) for side in sides]
            told += [f"--- {head}{name}: {text}" for name, text in zip(_names(sides), texts, strict=True)]
    return "\n\n".join(told)


def _rows(file: Path, formatter: Formatter) -> Iterator[tuple[str, list[Rendered] | RowError]]:
    for number, row in read_rows(file, formatter.columns):
        head = f"{file}, {place(file, number)}"
        try:
            yield head, row if isinstance(row, RowError) else formatter.render(row)
        except RowError as error:
            yield head, error


def _names(sides: list[Rendered]) -> tuple[str, ...]:
    return ("",) if len(sides) == 1 else (", chosen", ", rejected")


def _marked(
    side: Rendered, options: DatasetOptions, formatter: Formatter, tokenizer: Tokenizer, marks: tuple[str, str]
) -> str:
    (encoding,) = tokenizer.encode_batch([side.text])
    cut = options.max_sequence_length
    _, carries = cut_document(encoding, side.spans, turn_ends_of(formatter, tokenizer), cut)
    head = f"{len(encoding.ids)} tokens, {np.count_nonzero(carries)} of them carry the loss"
    if len(encoding.ids) > cut:
        head += f", cut after {cut} (dataset.max_sequence_length)"
    return f"{head}\n{_insert_marks(side.text, encoding, carries.tolist(), cut, marks)}"


def _insert_marks(text: str, encoding: Any, carries: list[bool], cut: int, marks: tuple[str, str]) -> str:
    """The text with `marks` around its runs of tokens that carry the loss, and a sign where it is cut."""
    starts = [start for start, _ in encoding.offsets] + [len(text)]
    pieces, last, inside = [], 0, False
    for position in range(len(encoding.ids) + 1):
        learnt = position < len(carries) and carries[position]
        if learnt != inside or position == cut:
            pieces.append(text[last : starts[position]])
            last = starts[position]
        if learnt != inside:
            pieces.append(marks[inside])
            inside = learnt
        if position == cut and cut < len(encoding.ids):
            pieces.append(_CUT)
    return "".join([*pieces, text[last:]])
