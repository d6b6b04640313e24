"""Rows into a file: JSON Lines, a JSON array, CSV or Parquet by its name, whole under that name or not there."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from posttrain.data.codes import Row
from posttrain.errors import ConfigError, DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet")


def check_new_file(path: Path, force: bool = False) -> None:
    """Raises ConfigError where `path` cannot be written: another kind of file, one that is there, no folder for it."""
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"{path}: rows are written as {', '.join(KINDS)}", hint=f"{path.stem}.jsonl")
    if path.exists() and not force:
        raise ConfigError(f"{path}: there is such a file already", hint="--force writes over it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}", hint="create it first")


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write `rows` as they come (all of them are held for CSV and Parquet, whose columns must be known); how many."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _write_parquet(path, list(rows))
    with _Replacing(path) as write:
        if kind == ".json":
            return _write_array(write, iter(rows))
        if kind == ".csv":
            return _write_csv(write, list(rows))
        count = 0
        for count, row in enumerate(rows, start=1):  # noqa: B007 - the last number is the count
            write(_line(row) + "\n")
        return count


def _write_csv(write: Callable[[str], Any], rows: list[Row]) -> int:
    """Lists and objects become JSON in their cells, and are read back as such where they are messages."""

    class Lines:
        def write(self, text: str) -> Any:
            return write(text)

    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(Lines(), columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: _line(value) if isinstance(value, list | dict) else value for name, value in row.items()}
        )
    return len(rows)


def _write_parquet(path: Path, rows: list[Row]) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow", hint="pip install 'posttrain[data]'") from error
    columns = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(f".{path.name}.partial")
    try:
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
        parquet.write_table(table, temporary)
        os.replace(temporary, path)
    except (pyarrow.ArrowException, OverflowError) as error:
        hint = "Parquet wants one type a column: write .jsonl"
        raise DataError(f"{path}: the rows do not fit into a table: {error}", hint=hint, code="E-DATA-0051") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def _write_array(write: Callable[[str], Any], rows: Iterator[Row]) -> int:
    count = 0
    for count, row in enumerate(rows, start=1):
        write(("[\n" if count == 1 else ",\n") + _line(row))
    write("\n]\n" if count else "[]\n")
    return count


def _line(row: Any) -> str:
    """Characters as they are, but for half of a surrogate pair, which no UTF-8 can hold."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False, default=str)
    return text


class _Replacing:
    """A file that is whole under its name or not there: written beside it, synced, renamed."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Callable[[str], Any]:
        handle, self.temporary = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
        self.file = os.fdopen(handle, "w", encoding="utf-8", newline="\n")
        return self.file.write

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
            if kind is None:
                os.chmod(self.temporary, 0o666 & ~_umask())
                os.replace(self.temporary, self.path)
        finally:
            if os.path.exists(self.temporary):
                os.unlink(self.temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
