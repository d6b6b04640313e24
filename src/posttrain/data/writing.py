"""Rows into a file: JSON Lines, a JSON array, CSV or Parquet by its name, whole under that name or not there."""

from __future__ import annotations

import csv
import errno
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from posttrain.data.codes import Row, excerpt
from posttrain.data.parquet import NO_CHARACTER, columns_of, no_table, not_json, types_of, write_parquet
from posttrain.data.sources import files_of
from posttrain.errors import ConfigError, DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
TABLES = (".csv", ".parquet")
NO_CELL = (list, dict, bytes)
"""What is written into a cell as JSON, or not at all."""


def check_new_file(path: Path, force: bool = False, sources: Iterable[Any] = ()) -> None:
    """Raises ConfigError where `path` cannot be written: another kind of file, one that is there, one that is read from
    (`sources`, even with `force`), no folder for it."""
    if path.suffix.lower() not in KINDS:
        raise ConfigError(
            f"{path}: rows are written as {', '.join(KINDS)}", hint=f"{path.name.partition('.')[0]}.jsonl"
        )
    check_place(path, sources=sources)
    if path.exists() and not force:
        raise ConfigError(f"{path}: there is such a file already", hint="--force writes over it")


def check_place(path: Path, option: str = "", sources: Iterable[Any] = ()) -> None:
    """Raises ConfigError where no file `path` can come to be, and where it is one of `sources`: found out before any
    work is done. `option` is what named it."""
    said = f"{option} {path}".strip()
    if path.is_dir():
        raise ConfigError(f"{said} is a folder", hint="name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{said}: there is no folder {path.parent}", hint=f"mkdir -p {shlex.quote(str(path.parent))}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{said}: nothing can be written into {path.parent}", hint="name a folder of your own")
    for source in (source for source in sources if isinstance(source, str | Path)):
        if os.path.isdir(source) and path.parent.samefile(source) and path.suffix.lower() in KINDS:
            raise ConfigError(f"{said} would lie in the folder that is read", hint="name a file in another folder")
        if any(_is_same(path, Path(file)) for file in files_of(source)):
            raise ConfigError(f"{said} is what is read; it is never written over",
                              hint="name another file")  # fmt: skip


def check_report(path: Path, option: str, sources: Iterable[Any] = ()) -> None:
    """`check_place`, and besides that what is there already is no more than an earlier report."""
    check_place(path, option, sources)
    if path.exists() and not _is_report(path):
        raise ConfigError(
            f"{option} {path}: there is such a file already, and it is no report", hint="name another one"
        )


def _is_same(one: Path, other: Path) -> bool:
    """Whether both name one file, also where it is still to be written."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _is_report(path: Path) -> bool:
    """By how reports and pages of ours begin."""
    with open(path, "rb") as file:
        beginning = file.read(200).lstrip().lower()
    return beginning.startswith(b"<!doctype html") or (beginning.startswith(b"{") and b'"schema_version"' in beginning)


def write_rows(
    path: Path,
    rows: Iterable[Row],
    check: Callable[[Path], None] | None = None,
    why_empty: Callable[[], str] | None = None,
    like: Any = None,
) -> int:
    """Write `rows` as they come (all of them are held for CSV and Parquet, whose columns must be known); how many.
    `check` is given the whole file before it is in place, and may refuse it. A file without a row is none: DataError
    (E-DATA-0031), with what `why_empty` says by then. `like` is where they come from: what is of Parquet there keeps
    its types."""
    with _replacing(path, check) as temporary:
        count = _write(temporary, path, rows, like)
        if not count:
            hint = why_empty() if why_empty is not None else None
            message = f"{path}: not a single row is left to write"
            raise DataError(message, hint=hint or "there is none in what was read", code="E-DATA-0031")
        return count


def _write(temporary: Path, path: Path, rows: Iterable[Row], like: Any) -> int:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return write_parquet(temporary, path, list(rows), types_of(files_of(like)))
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        if kind == ".json":
            return _write_array(file.write, iter(rows))
        if kind == ".csv":
            return _write_csv(file, path, list(rows))
        count = 0
        for count, row in enumerate(rows, start=1):  # noqa: B007 - the last number is the count
            file.write(_line(row) + "\n")
        return count


def _write_csv(file: TextIO, path: Path, rows: list[Row]) -> int:
    """Lists and objects become JSON in their cells, and are read back as such where a format has a place for them."""
    writer = csv.DictWriter(file, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    try:
        for row in rows:
            writer.writerow(
                {name: _line(value, name) if isinstance(value, NO_CELL) else value for name, value in row.items()}
            )
    except UnicodeEncodeError as error:
        raise no_table(path, NO_CHARACTER) from error
    return len(rows)


def write_report(path: Path, document: dict[str, Any], **listed: Iterable[Any]) -> None:
    """One JSON object, for people to read as well. What is `listed` comes behind the rest of it, one by one, for there
    may be more than the memory holds."""
    with (
        _replacing(path, None) as temporary,
        # Half of a surrogate pair, in what is quoted of a row, as JSON says it.
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.write(_for_people(document).removesuffix("\n}"))
        for name, values in listed.items():
            file.write(f',\n "{name}": [')
            for number, value in enumerate(values):
                file.write((",\n" if number else "\n") + _for_people(value))
            file.write("]")
        file.write("\n}\n")


def _for_people(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def _write_array(write: Callable[[str], Any], rows: Iterator[Row]) -> int:
    count = 0
    for count, row in enumerate(rows, start=1):
        write(("[\n" if count == 1 else ",\n") + _line(row))
    write("\n]\n" if count else "[]\n")
    return count


def _line(row: Any, column: str | None = None) -> str:
    """Characters as they are, but for half of a surrogate pair, which no UTF-8 can hold. `row` may be what stands in
    one `column` of it."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except TypeError as error:
        if column is None:
            column = next(name for name, value in row.items() if not_json(value) == "bytes")
        hint = "write .parquet, which has a type for them, or leave the column out"
        raise DataError(f"column `{column}` holds bytes, which JSON has not", hint=hint, code="E-DATA-0051") from error
    except ValueError as error:
        message = f"a row holds NaN or an infinity, which JSON has not\n  | {excerpt(repr(row))}"
        raise DataError(message, hint="write null, or leave the field out", code="E-DATA-0005") from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False, default=str)
    return text


def _as_text(value: Any) -> str:
    """Dates, times and decimals have a form in which all write them; bytes have none."""
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return str(value)


@contextmanager
def _replacing(path: Path, check: Callable[[Path], None] | None) -> Iterator[Path]:
    """A file that is whole under its name or not there: written beside it, synced, looked at, renamed."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix.lower(), dir=path.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        message = f"{path}: nothing can be written there: {error.strerror}"
        raise ConfigError(message, hint="name another folder") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
