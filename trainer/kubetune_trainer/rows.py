"""Data files to rows, one at a time: a file may be larger than memory.

A row that cannot be read comes as a RowError in its place, so that whoever reads on decides what becomes of it.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from kubetune_contract.exit_codes import ExitCode, JobError

Row = dict[str, Any]
Numbered = Iterator[tuple[int, "Row | RowError"]]
"""The number of each row in its file, and the row. Lines of JSON Lines are counted with the blank ones, from 1."""

_CHUNK: Final = 1 << 20
_LONGEST_CELL: Final = 1 << 30
_PARQUET_ROWS: Final = 256
"""Rows that are turned into Python objects at once."""


class DataError(JobError):
    """The data cannot be trained on. Names the file, the rows and the reasons."""

    exit_code = ExitCode.INVALID_DATA


class RowError(Exception):
    """Why one row cannot be used."""


def find_files(path: Path) -> list[Path]:
    """The data files at a path: itself, or those below it by name, hidden ones left out.

    Raises DataError where there are none.
    """
    if not path.is_dir():
        return [path]
    below = (file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
    files = sorted(file for file in below if not _is_hidden(file.relative_to(path)))
    if not files:
        raise DataError(f"{path} holds no data files: their names end in {', '.join(READERS)}")
    return files


def digest_files(files: list[Path]) -> str:
    """SHA-256 over the kind and content of the files, in this order. Raises DataError where one cannot be read."""
    digest = sha256()
    for file in files:
        with open_file(file) as stream:
            digest.update(file.suffix.encode() + file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_rows(file: Path, columns: set[str]) -> Numbered:
    """The rows of a file, read as its name says. Other columns than these may be missing from them.

    Raises DataError for a file that cannot be read.
    """
    if file.suffix not in READERS:
        raise DataError(f"{file} is of an unknown kind: names of data files end in {', '.join(READERS)}")
    return READERS[file.suffix](file, columns)


def place(file: Path, number: int) -> str:
    """Where a row stands, for people."""
    return f"{'line' if file.suffix in LINES else 'row'} {number}"


def open_file(file: Path) -> BufferedReader:
    """The file as bytes. Raises DataError where it cannot be read."""
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# --- the kinds of files ---


def _json_lines(file: Path, _columns: set[str]) -> Numbered:
    with open_file(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _json(file: Path, columns: set[str]) -> Numbered:
    """An array of objects; or JSON Lines under a name that is common for them too."""
    with open_file(file) as stream:
        start = stream.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start and not start.startswith(b"["):
        yield from _json_lines(file, columns)
        return
    for number, item in enumerate(_items(file), start=1):
        yield number, _parse(item)


def _parse(text: bytes) -> Row | RowError:
    try:
        row = json.loads(text)
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except ValueError as error:
        return RowError(f"not JSON ({error})")
    except RecursionError:
        return RowError("not JSON (nested too deeply)")
    return row if isinstance(row, dict) else RowError("not an object with the columns as its keys")


_JSON_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)


def _items(file: Path) -> Iterator[bytes]:
    """The texts of the items of an array, found by brackets alone: a damaged item does not spoil the next."""
    depth, text, position = 0, b"", 0
    with open_file(file) as stream:
        while chunk := stream.read(_CHUNK):
            text, start = text + chunk, 0
            while token := _JSON_TOKEN.search(text, position):
                mark = token[0]
                if mark == b'"':  # its end has not been read yet
                    break
                position = token.end()
                closes = mark in b"]}"
                if (mark == b"," and depth == 1) or (closes and depth == 1):
                    if item := text[start : token.start()].strip():
                        yield item
                    start = position
                depth += (mark in b"[{") - closes
                if mark == b"[" and depth == 1:
                    start = position
            position = token.start() if token else len(text)
            text, position = text[start:], position - start
    if rest := text.strip():
        yield rest


def _csv(file: Path, _columns: set[str]) -> Numbered:
    csv.field_size_limit(_LONGEST_CELL)
    open_file(file).close()
    # Bytes that are no text become surrogates, so that their row can be told.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        number = 0
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, RowError(f"not CSV ({error})")
                continue
            yield number, _checked_cells(row)


def _checked_cells(row: Row) -> Row | RowError:
    if None in row or None in row.values():
        return RowError("has another number of cells than the first line has names")
    if any("\ud800" <= letter <= "\udfff" for cell in row.values() if not cell.isascii() for letter in cell):
        return RowError("not UTF-8")
    return row


def _parquet(file: Path, columns: set[str]) -> Numbered:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    open_file(file).close()
    number = 0
    try:
        with ParquetFile(file, memory_map=True) as parquet:
            names = [name for name in parquet.schema_arrow.names if name in columns]
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a whole Parquet file: {error}") from error


READERS: Final[dict[str, Callable[[Path, set[str]], Numbered]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
"""Kinds of data files, by the end of their names."""
LINES: Final = frozenset({".jsonl", ".ndjson"})
"""Kinds of which a row is a line."""
