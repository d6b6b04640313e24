"""Reader of CSV, with a header; semicolons and tabs are recognised by it."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.data.cells import parsed
from posttrain.data.codes import Reject, Row, bad_row, excerpt, refuse
from posttrain.data.columns import BOOLEANS, way_to_json
from posttrain.data.lines import decode, raw_lines
from posttrain.errors import DataError
from posttrain.types import Origin

Rows = Iterator[tuple[Origin, Row]]

QUOTED = re.compile(r'"[^"]*"')
logger = logging.getLogger("posttrain")


def read_csv(path: Path, reject: Reject) -> Rows:
    """All values are text, but for what formats look for and a cell holds as JSON, and for ratings. A row may run over
    several lines inside quotes; its origin is the first."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    bad: dict[int, DataError] = {}
    lines = _lines(path, bad)
    first, skipped = next(lines, ""), 0
    while first and not first.strip():
        first, skipped = next(lines, ""), skipped + 1
    if not first:
        raise DataError(f"{path}: the file holds white space only", hint="a header line is wanted", code="E-DATA-0006")
    delimiter = max(",;\t", key=QUOTED.sub("", first).count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = _header(next(_records(reader, skipped, path, refuse, bad))[1], path, first)
    for row, (line, values) in enumerate(_records(reader, skipped, path, reject, bad)):
        origin = Origin(str(path), row, line)
        if len(values) != len(header):
            what = f"has {len(values)} fields, but the header has {len(header)}"
            hint = f"put quotes around fields that hold a {delimiter!r}"
            reject(bad_row("E-DATA-0007", origin, what, row=delimiter.join(values), hint=hint), origin)
            continue
        try:
            yield origin, {name: _cell(name, value, origin) for name, value in zip(header, values, strict=True)}
        except DataError as error:
            reject(error, origin)


def _lines(path: Path, bad: dict[int, DataError]) -> Iterator[str]:
    """Every line as text; those that are not UTF-8 with marks in place of what cannot be read, and kept in `bad`."""
    for index, raw in enumerate(raw_lines(path)):
        try:
            text = decode(raw, Origin(str(path), index, index + 1))
        except DataError as error:
            bad[index + 1] = error
            text = raw.decode("utf-8", "replace")
        if "\r" in text.rstrip("\r\n") and index == 0 and "\n" not in text:
            hint = f"tr '\\r' '\\n' < {path} > fixed{path.suffix}"
            raise DataError(f"{path}: lines end with a carriage return only", hint=hint, code="E-DATA-0007")
        yield text


def _header(names: list[str], path: Path, first: str) -> list[str]:
    header = [name.strip() for name in names]
    if header != names:
        logger.info("%s: spaces around the names of the header are left out: %s", path, ", ".join(header))
    if len(set(header)) < len(header) or not all(header):
        message = f"{path}:1: the header names a column twice or not at all: {excerpt(first.strip())}"
        raise DataError(message, hint="give every column one name of its own", code="E-DATA-0007")
    return header


def _cell(name: str, value: str, origin: Origin) -> Any:
    """What is written as JSON as what it stands for; so is a `label` of true or false, which a table cannot tell from
    the word."""
    if name == "label":
        return BOOLEANS.get(value.strip().lower(), value)
    try:
        return parsed(name, value)
    except (ValueError, RecursionError) as error:
        what = f"is not valid JSON: {error}"
        hint = way_to_json(value) or "a CSV cell holds JSON"
        raise bad_row("E-DATA-0011", origin, what, field=name, row=value, hint=hint) from None


def _records(
    reader: Any, skipped: int, path: Path, reject: Reject, bad: dict[int, DataError]
) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record and the line it begins on; blank lines are passed over. Strictly: a quote that is never
    closed would swallow the rest of the file."""
    row = 0
    while True:
        line = reader.line_num + 1 + skipped
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'a quote inside a quoted field is written twice: ""'
            broken = DataError(f"{path}:{line}  broken CSV: {error}", hint=hint, code="E-DATA-0007")
            if "end of data" in str(error):  # the rest of the file stands inside this quote
                raise broken from None
            reject(broken, Origin(str(path), row, line))
            row += 1
            continue
        unreadable = [bad.pop(n) for n in range(line, reader.line_num + 1 + skipped) if n in bad]
        if unreadable:
            reject(unreadable[0], Origin(str(path), row, line))
        elif values:
            yield line, values
        row += bool(values)
