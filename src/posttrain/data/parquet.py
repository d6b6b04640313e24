"""Parquet files, read and written. A column that Arrow cannot hold as it is (tools of different shapes, say) is written
as JSON in a text, as in CSV, and read back as what it was where a format has a place for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.data.cells import CHAT_COLUMNS, NESTED, parsed
from posttrain.data.codes import Reject, Row, kind
from posttrain.data.lines import HOLE
from posttrain.errors import DataError
from posttrain.types import Origin

Rows = Iterator[tuple[Origin, Row]]


def read_parquet(path: Path, reject: Reject) -> Rows:
    pyarrow, parquet = _pyarrow(path)
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unopened(path, error) from error
    names = file.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        message = f"{path}: two columns are called {', '.join(map(repr, twice))}, of which a row keeps one"
        raise DataError(message, hint="give every column one name of its own", code="E-DATA-0007")
    has_floats = "float" in str(file.schema_arrow) or "double" in str(file.schema_arrow)
    row, batches = 0, file.iter_batches()
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            message = f"{path}[{row}]: the file is damaged from about this row on: {error}"
            raise DataError(
                message, hint="write it again; what comes before can be read", code="E-DATA-0007"
            ) from error
        if batch is None:
            return
        for values in _batch_rows(batch):
            origin = Origin(str(path), row)
            row += 1
            if isinstance(values, UnicodeDecodeError):
                message = f"{origin}  a text is not UTF-8: {values.reason} at byte {values.start}"
                reject(DataError(message, hint="write the column as UTF-8", code="E-DATA-0003"), origin)
            elif has_floats and (column := _not_finite(values)) is not None:
                message = f"{origin}  column `{column}` holds NaN or an infinity"
                hint = f"write null, or leave {column} out"
                reject(DataError(message, hint=hint, code="E-DATA-0005"), origin)
            else:
                yield origin, clean_arrow_row(values)


def _unopened(path: Path, error: Exception) -> DataError:
    """A file that begins like one of Parquet is one that was damaged, or not written to its end."""
    with open(path, "rb") as file:
        beginning = file.read(len(HOLE))
    if beginning == HOLE:
        hint = "write it, or download it, again"
        return DataError(f"{path}: the file begins with NUL bytes: it is damaged or not whole", hint=hint,
                         code="E-DATA-0007")  # fmt: skip
    is_parquet = beginning[:4] == b"PAR1"
    what = "the Parquet file is damaged or breaks off" if is_parquet else "not a Parquet file"
    hint = "write it, or download it, again" if is_parquet else "name the file by what it holds, e.g. .jsonl"
    return DataError(f"{path}: {what}: {error}", hint=hint, code="E-DATA-0007" if is_parquet else "E-DATA-0001")


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow", hint="pip install 'posttrain[data]'") from error
    return pyarrow, parquet


def _batch_rows(batch: Any) -> Iterator[Row | UnicodeDecodeError]:
    """The rows of an Arrow batch, or why one of them cannot be read."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


def _not_finite(row: Row) -> str | None:
    """The first column that holds a number which JSON has not: such a row could be trained on and never written."""
    return next((name for name, value in row.items() if not _is_finite(value)), None)


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_is_finite, items))


def clean_arrow_row(row: Row) -> Row:
    """Arrow gives every struct of a column all keys that any of them has, so one row's tool argument shows up as a
    null in all other rows: in messages and tools these nulls are dropped. Other columns stay as they are. Messages that
    come as JSON in a text become messages."""
    return {key: _cleaned(key, value) if key in NESTED else value for key, value in row.items()}


def _cleaned(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            return parsed(name, value)
        except ValueError:  # a format will say what it makes of a text there
            return value
    return _without_nulls(value) if name in CHAT_COLUMNS else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# --- writing --------------------------------------------------------------------------------------------------------


NO_CHARACTER = "half of a surrogate pair is no character"


def columns_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def no_table(path: Path, why: object) -> DataError:
    hint = "a table wants one type a column: write .jsonl"
    return DataError(f"{path}: the rows do not fit into a table: {why}", hint=hint, code="E-DATA-0051")


def write_parquet(file: Path, name: Path, rows: list[Row], types: Mapping[str, Any]) -> int:
    """Into `file`; in messages it is called `name`. `types` are those that columns had where they came from."""
    pyarrow, parquet = _pyarrow(name)
    columns: dict[str, Any] = {}
    for column in columns_of(rows):
        values = [row.get(column) for row in rows]
        array = _as_before(pyarrow, column, values, types[column]) if column in types else None
        columns[column] = _array(pyarrow, column, values, name) if array is None else array
    parquet.write_table(pyarrow.table(columns), file)
    return len(rows)


def types_of(files: Iterable[Any]) -> dict[str, Any]:
    """Arrow's type of each column, if all `files` are of Parquet and agree on it."""
    schemas = []
    for file in files:
        if not isinstance(file, str | Path) or Path(file).suffix.lower() != ".parquet":
            return {}
        _, parquet = _pyarrow(Path(file))
        schemas.append(parquet.read_schema(file))
    found = [{name: schema.field(name).type for name in schema.names} for schema in schemas]
    return {name: was for name, was in found[0].items() if all(one.get(name) == was for one in found)}


def _as_before(pyarrow: Any, column: str, values: list[Any], was: Any) -> Any:
    """The values as Arrow's type `was`; None where they are no longer of it, or would not come back."""
    try:
        array = pyarrow.array(values, was)
        back = array.to_pylist()
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return None
    is_same = _unchanged(column, values, back) if column in NESTED else back == values
    return array if is_same else None


def _array(pyarrow: Any, column: str, values: list[Any], path: Path) -> Any:
    try:
        array = pyarrow.array(values)
        if _holds_nothing(pyarrow, array.type):
            raise pyarrow.ArrowNotImplementedError("an object without keys has no place in Parquet")
        if column not in NESTED or _unchanged(column, values, array.to_pylist()):
            return array
        why: object = "it would come back otherwise"
    except UnicodeEncodeError:
        why = NO_CHARACTER
    except (pyarrow.ArrowException, OverflowError) as error:
        why = error
    if not any(isinstance(value, list | dict) for value in values):
        raise no_table(path, f"column `{column}`: {why}")
    if (other := next((found for value in values if (found := not_json(value))), None)) is not None:
        raise no_table(path, f"column `{column}` holds {other}, which would become text: {why}")
    return pyarrow.array([_as_text(value) for value in values], pyarrow.string())


def not_json(value: Any) -> str | None:
    """What is in `value` that JSON has not: bytes, a datetime, a Decimal."""
    if isinstance(value, dict | list | tuple):
        found = [there for item in (value.values() if isinstance(value, dict) else value) if (there := not_json(item))]
        return "bytes" if "bytes" in found else next(iter(found), None)
    if isinstance(value, str | int | float | None):
        return None
    return "bytes" if isinstance(value, bytes) else kind(value)


def _holds_nothing(pyarrow: Any, of: Any) -> bool:
    """Whether somewhere in it is an object without keys, as `"properties": {}` of a tool without arguments."""
    if pyarrow.types.is_struct(of):
        return of.num_fields == 0 or any(_holds_nothing(pyarrow, field.type) for field in of)
    return bool(pyarrow.types.is_list(of)) and _holds_nothing(pyarrow, of.value_type)


def _unchanged(column: str, values: list[Any], back: list[Any]) -> bool:
    """Whether a struct's keys, which Arrow gives to all, are all that came in on the way."""
    return all(_as_text(_cleaned(column, there)) == _as_text(value) for value, there in zip(values, back, strict=True))


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=True, sort_keys=True, default=str)
