"""Files of every kind to rows, one at a time; what cannot be read is told in its place."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubetune_trainer import rows
from kubetune_trainer.rows import DataError, RowError, digest_files, find_files, place, read_rows

ROWS: list[dict[str, Any]] = [
    {"text": 'a "quoted" [text], with {braces}', "n": "1"},
    {"text": "äöü 日本 🙂\nsecond line", "n": "2"},
    {"text": "", "n": "3"},
]


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS))


def write_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False))


def write_compact_array(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS, separators=(",", ":")).encode())


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "n"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(ROWS), path)


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "JSON Lines with blank lines": ("rows.jsonl", write_jsonl),
    "JSON Lines under their other name": ("rows.ndjson", write_jsonl),
    "JSON Lines that are called JSON": ("rows.json", write_jsonl),
    "an indented JSON array": ("rows.json", write_array),
    "a compact JSON array with a byte order mark": ("rows.json", write_compact_array),
    "CSV with line breaks in cells": ("rows.csv", write_csv),
    "Parquet": ("rows.parquet", write_parquet),
}


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_file_gives_the_same_rows(case: str, tmp_path: Path) -> None:
    name, write = KINDS[case]
    write(tmp_path / name)
    assert [row for _, row in read_rows(tmp_path / name, {"text", "n"})] == ROWS


def test_an_array_is_read_across_the_borders_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_array(path := tmp_path / "rows.json")
    for size in range(1, 40):
        monkeypatch.setattr(rows, "_CHUNK", size)
        assert [row for _, row in read_rows(path, set())] == ROWS, f"chunks of {size} bytes"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)  # files
@given(
    values=st.lists(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3), max_size=4), ascii_only=st.booleans()
)
def test_any_array_is_read_as_json_reads_it(
    values: list[dict[str, Any]], ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.json"
    path.write_text(json.dumps(values, ensure_ascii=ascii_only))
    assert [row for _, row in read_rows(path, set())] == values


DAMAGED: dict[str, tuple[str, bytes, list[int], str]] = {
    "a broken line": ("x.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', [1, 3], "not JSON ("),
    "a line that is no text": ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', [1], "not UTF-8"),
    "a line that is no object": ("x.jsonl", b'{"a": 1}\n[1]\n', [1], "not an object with the columns as its keys"),
    "a line nested too deeply": ("x.jsonl", b'{"a": 1}\n' + b"[" * 100_000, [1], "not JSON (nested too deeply)"),
    "a broken item does not spoil the next": ("x.json", b'[{"a": 1}, {"a" 7}, {"a": 2}]', [1, 3], "not JSON ("),
    "an array that ends too early": ("x.json", b'[{"a": 1}, {"a": [1, 2', [1], "not JSON ("),
    "a row of CSV with too many cells": ("x.csv", b"a,b\n1,2\n3,4,5\n6,7\n", [1, 3], "another number of cells"),
    "a row of CSV with too few cells": ("x.csv", b"a,b\n1,2\n3\n6,7\n", [1, 3], "another number of cells"),
    "a cell of CSV that is no text": ("x.csv", b"a,b\n1,\xff\n6,7\n", [2], "not UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_row_is_told_in_its_place(case: str, tmp_path: Path) -> None:
    name, content, good, reason = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    found = list(read_rows(tmp_path / name, {"a"}))
    assert [number for number, row in found if not isinstance(row, RowError)] == good
    (error,) = [row for _, row in found if isinstance(row, RowError)]
    assert reason in str(error)


REFUSED: dict[str, tuple[str, bytes | None, str]] = {
    "a missing file": ("none.jsonl", None, r"none\.jsonl cannot be read: No such file or directory"),
    "a missing CSV file": ("none.csv", None, r"none\.csv cannot be read"),
    "an unknown kind": ("x.txt", b"hello", r"x\.txt is of an unknown kind: names of data files end in \.jsonl, "),
    "a broken Parquet file": ("x.parquet", b"PAR1 and no more", r"x\.parquet is not a whole Parquet file: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_is_told(case: str, tmp_path: Path) -> None:
    name, content, words = REFUSED[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_rows(tmp_path / name, set()))


def test_only_the_columns_that_are_needed_leave_a_parquet_file(tmp_path: Path) -> None:
    write_parquet(path := tmp_path / "rows.parquet")
    assert list(read_rows(path, {"n", "absent"})) == [(1, {"n": "1"}), (2, {"n": "2"}), (3, {"n": "3"})]


def test_a_folder_is_its_data_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.csv", "README.md", ".hidden.jsonl", ".git/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files(tmp_path) == [tmp_path / "a/z.csv", tmp_path / "b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no data files: their names end in \.jsonl"):
        find_files(tmp_path / "empty")


def test_the_digest_is_that_of_content_and_kind(tmp_path: Path) -> None:
    one, same, other, table = (tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl", "4.csv"))
    for path, text in ((one, "x"), (same, "x"), (other, "y"), (table, "x")):
        path.write_text(text)
    assert digest_files([one]) == digest_files([same])
    assert len({digest_files(files) for files in ([one], [other], [table], [one, other], [other, one])}) == 5


def test_rows_of_line_files_are_called_lines() -> None:
    assert [place(Path(name), 3) for name in ("a.jsonl", "a.parquet")] == ["line 3", "row 3"]
