"""Labelled texts from a CSV, TSV, JSONL or Parquet file, or the demo's reviews; rows are checked before a model is loaded."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMED_DATA = ("reviews", "random-images")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Example:
    """Texts are as they stand in the file, leading and trailing blanks too.

    label: without them; None where the file's labels are not wanted
    second: another text of the row, such as a hypothesis or a response
    """

    text: str
    label: str | None
    second: str | None = None


@dataclass(frozen=True)
class Columns:
    """Names of columns. label None: texts alone, for language models; second: of another text, if there is one"""

    text: str = "text"
    label: str | None = "label"
    second: str | None = None


def read_examples(data: str, columns: Columns, seed: int = 0) -> list[Example]:
    """All rows of a file, or the demo's training reviews shuffled by `seed`.

    Raises FileNotFoundError, and ValueError naming the row for unknown columns, rows without text or label, and no rows.
    """
    if data == "reviews":
        from cobra.cli.reviews import load_reviews

        return [Example(r.text, str(r.label)) for r in load_reviews(seed)[0]]
    path = Path(data)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{data}: expected a file ending in {', '.join(SUFFIXES)}, or one of {', '.join(NAMED_DATA)}")
    if not path.is_file():
        raise FileNotFoundError(f"{data}: no such file")
    examples = [_example(path, number, row, columns) for number, row in _rows(path)]
    if not examples:
        raise ValueError(f"{data} has no rows")
    return examples


def as_numbers(labels: list[str]) -> list[float] | None:
    """Labels as numbers, None where one is not."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(row's number from 1, row)"""
    if path.suffix.lower() == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            if path.suffix.lower() == ".jsonl":
                yield from ((i, _json_row(path, i, line)) for i, line in enumerate(f, 1) if line.strip())
                return
            tabs = path.suffix.lower() == ".tsv"
            quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL  # as published TSV sets are written
            with _cells_of_any_length():
                rows = list(csv.DictReader(f, delimiter="\t" if tabs else ",", quoting=quoting))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a {path.suffix[1:].upper()} file in UTF-8: {error}") from error
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(
                f"{path}, row {number}: {len(row[None])} cells more than the header has columns; "
                f"{'drop tabs' if tabs else 'quote texts that hold commas'}"
            )
        yield number, row


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """csv refuses cells above 131,072 characters, by a setting of the process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_row(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {number}: not JSON: {error.msg} at character {error.pos + 1}") from error


def _parquet_rows(path: Path) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def _example(path: Path, number: int, row: object, columns: Columns) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, row {number}: expected an object with columns, found {str(row)[:40]}")
    wanted = [column for column in (columns.text, columns.second, columns.label) if column is not None]
    for column in wanted:
        if column not in row:
            known = ", ".join(map(str, row))
            raise ValueError(
                f"{path}, row {number}: no column {column!r}; it has {known}. Name the right one, as with --text or --label"
            )
        if isinstance(row[column], (list, dict)):
            kind = "list" if isinstance(row[column], list) else "record"
            what, way = "text", "write one text a column, a chat as its prompt and its response"
            if column == columns.label:
                what, way = "label", "rows have one label, a word or a number; write each of several in a column, and name one"
            raise ValueError(f"{path}, row {number}: column {column!r} holds a {kind}, not a {what}: {way}")
    cells = {column: "" if row[column] is None else str(row[column]) for column in wanted}
    if columns.label is not None:
        cells[columns.label] = cells[columns.label].strip()
    for column, value in cells.items():
        if not value.strip() or (column == columns.label and value.lower() in ("nan", "inf", "-inf")):
            raise ValueError(f"{path}, row {number}: column {column!r} is {value.strip() or 'empty'}; fill it or drop the row")
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{path}, row {number}: column {column!r} holds half a character (a lone surrogate); mend it")
    return Example(cells[columns.text], cells.get(columns.label), cells.get(columns.second))
