"""Rows with what they say, for verbs that write them again; unusable ones stop, or are counted and listed."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.codes import Row, bad_row
from posttrain.data.columns import rename_columns
from posttrain.data.doctor.content import RowReader, Said
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.tokens import is_tokenized
from posttrain.errors import DataError
from posttrain.types import Example, Origin

SKIPPED = "skipped"


class Skipped:
    """Every row that was left out, and why: on disk, for of a large file it may be most."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(2**20, "w+", encoding="utf-8")  # noqa: SIM115 - lives as long
        self.count = 0

    def add(self, error: DataError, origin: Origin) -> None:
        row = {"row": str(origin), "code": error.code, "message": error.message, "hint": error.hint}
        self._file.write(json.dumps(row) + "\n")
        self.count += 1

    def take(self, other: Skipped) -> None:
        """Those of `other` as well."""
        for row in other:
            self._file.write(json.dumps(row) + "\n")
        self.count += other.count

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, str | None]]:
        self._file.seek(0)
        yield from map(json.loads, self._file)


@dataclass
class Reading:
    """The rows of `source` with what they say; unusable ones raise, or are noted as `left_out` where `on_bad_row` is
    skip. They are read anew each time."""

    source: Any
    settings: DataSettings
    noted: Skipped | None = None
    left_out: Skipped = field(init=False)

    def __post_init__(self) -> None:
        self.left_out = Skipped() if self.noted is None else self.noted

    @property
    def skipped(self) -> int:
        return self.left_out.count

    def why_empty(self) -> str:
        """Of a file to which nothing is left."""
        return "every row was skipped: without --policy skip it is said why" if self.skipped else ""

    def rows(self) -> Iterator[tuple[Origin, Row]]:
        self.left_out.clear()
        return read_rows(self.source, reject=self.reject)

    def said(self) -> Iterator[tuple[Origin, Row, Said]]:
        reader = RowReader(self.settings)
        for origin, row in self.rows():
            try:
                yield origin, row, reader.read(row, origin)
            except DataError as error:
                self.reject(error, origin)

    def examples(self) -> Iterator[tuple[Example, Said]]:
        reader = RowReader(self.settings)
        for origin, row in self.rows():
            try:
                _check_no_tokens(row, origin, self.settings)
                yield reader.trainable(row, origin)
            except DataError as error:
                self.reject(error, origin)

    def reject(self, error: DataError, origin: Origin) -> None:
        if self.settings.on_bad_row == "error":
            raise error
        self.left_out.add(error, origin)


def _check_no_tokens(row: Row, origin: Origin, settings: DataSettings) -> None:
    """Training reads token ids where a row has them, whatever else it has."""
    if is_tokenized(rename_columns(row, settings.column_map, origin)):
        what = "holds token ids: a row that is tokenised has no text to convert"
        hint = "convert the rows that it was made of; if the text beside it is meant, --map input_ids=own_input_ids"
        raise bad_row("E-DATA-0052", origin, what, field="input_ids", row=row, hint=hint)


def hashed(*texts: str) -> int:
    """64 bits of the texts, to the letter."""
    plain = "\0".join(texts)
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
