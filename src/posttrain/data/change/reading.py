"""Rows with what they say, for verbs that write them again; unusable ones stop, or are counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.data.codes import Row
from posttrain.data.doctor.content import RowReader, Said
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError
from posttrain.types import Example, Origin

SKIPPED = "skipped"


@dataclass
class Reading:
    """The rows of `source` with what they say; unusable ones raise, or are counted where `on_bad_row` is skip."""

    source: Any
    settings: DataSettings
    skipped: int = 0

    def rows(self) -> Iterator[tuple[Origin, Row]]:
        self.skipped = 0
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
                yield reader.trainable(row, origin)
            except DataError as error:
                self.reject(error, origin)

    def reject(self, error: DataError, _: Origin) -> None:
        if self.settings.on_bad_row == "error":
            raise error
        self.skipped += 1


def hashed(*texts: str) -> int:
    """64 bits of the texts, to the letter."""
    plain = "\0".join(texts)
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
