"""Readers of tables: CSV (with a header; semicolons and tabs are recognised by it) and what Arrow hands out."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.data.codes import Reject, Row, bad_row, excerpt
from posttrain.data.lines import text_lines
from posttrain.errors import DataError
from posttrain.types import Origin

Rows = Iterator[tuple[Origin, Row]]

CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools")


def read_csv(path: Path, reject: Reject) -> Rows:
    """All values are text. A row may run over several lines inside quotes; its origin is the first."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    lines = text_lines(path)
    first = next(lines)
    delimiter = max(",;\t", key=first.count)
    header = next(csv.reader([first], delimiter=delimiter))
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"{path}:1: the header names a column twice or not at all: {excerpt(first.strip())}")
    for row, (line, values) in enumerate(_records(lines, delimiter, path)):
        origin = Origin(str(path), row, line)
        if len(values) == len(header):
            yield origin, dict(zip(header, values, strict=True))
        else:
            what = f"has {len(values)} fields, but the header has {len(header)}"
            hint = f"put quotes around fields that hold a {delimiter!r}"
            reject(bad_row("E-DATA-0007", origin, what, row=delimiter.join(values), hint=hint), origin)


def _records(lines: Iterator[str], delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record after the header, and the line it begins on; blank lines are passed over. Strictly: a
    quote that is never closed would swallow the rest of the file."""
    reader, line = csv.reader(lines, delimiter=delimiter, strict=True), 2
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'a quote inside a quoted field is written twice: ""'
            raise DataError(f"{path}:{line}  broken CSV: {error}", hint=hint, code="E-DATA-0007") from None
        if values:
            yield line, values
        line = reader.line_num + 2


def read_parquet(path: Path, reject: Reject) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow", hint="pip install 'posttrain[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error
    batches = (batch.to_pylist() for batch in file.iter_batches())
    for index, row in enumerate(row for batch in batches for row in batch):
        yield Origin(str(path), index), clean_arrow_row(row)


def clean_arrow_row(row: Row) -> Row:
    """Arrow gives every struct of a column all keys that any of them has, so one row's tool argument shows up as a
    null in all other rows: in messages and tools these nulls are dropped. Other columns stay as they are."""
    return {key: _without_nulls(value) if key in CHAT_COLUMNS else value for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
