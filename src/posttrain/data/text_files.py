"""Reader of plain text files: every line is a row with the column `text`; blank lines are passed over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from posttrain.data.codes import Reject, Row
from posttrain.data.lines import decode, raw_lines
from posttrain.errors import DataError
from posttrain.types import Origin


def read_text(path: Path, reject: Reject) -> Iterator[tuple[Origin, Row]]:
    row = 0
    for number, raw in enumerate(raw_lines(path), start=1):
        if not raw.strip():
            continue
        origin = Origin(str(path), row, number)
        row += 1
        try:
            text = decode(raw, origin)
        except DataError as error:
            reject(error, origin)
        else:
            yield origin, {"text": text.rstrip("\r\n")}
