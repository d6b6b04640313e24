"""Rows that say what one before them says, left out: the same to the letter, or where asked nearly the same."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.change.convert import read_again
from posttrain.data.change.essence import essence
from posttrain.data.change.reading import SKIPPED, Reading, Skipped, hashed
from posttrain.data.codes import Row
from posttrain.data.doctor.content import RowReader, Said
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.sketches import CHUNK, Sketches, shingles
from posttrain.data.settings import DataSettings
from posttrain.data.writing import TABLES, write_rows
from posttrain.errors import ConfigError
from posttrain.types import Origin

NUM_GROUPS = 10_000
"""Groups that are named."""


def dedup(
    source: Any,
    out: Path,
    settings: DataSettings,
    by_prompt: bool = False,
    near: float | None = None,
    skipped: Skipped | None = None,
) -> dict[str, Any]:
    """Rows as they are, without those that say what one before them says (or ask it, with `by_prompt`), in whatever
    format. White space counts, but for empty lines before a text and what stands behind it: code and tables are made of
    it. So do tools and template arguments, and no column of the user's own; `skipped` takes the rows that were skipped.

    With `near`, a similarity, also without those whose words and whose answers' words are so much like those of an
    earlier one that is kept; `groups` names it and them. The rows are read twice, half a kilobyte is kept of each.
    """
    distinct = _Distinct(Reading(source, settings, skipped), by_prompt)
    if near is None:
        written = _write(out, (row for _, row, _ in distinct.rows()), distinct.reading)
        return {"written": written, "dropped": distinct.dropped, SKIPPED: distinct.reading.skipped}
    kept_for = _nearest(distinct, near)
    named: dict[int, list[str]] = {
        int(first): [] for first in np.unique(kept_for[kept_for != np.arange(len(kept_for))])
    }

    def kept() -> Iterator[Row]:
        for number, (origin, row, _) in enumerate(distinct.rows()):
            first = int(kept_for[number])
            if first in named:
                named[first].append(str(origin))
            if first == number:
                yield row

    written = _write(out, kept(), distinct.reading)
    counts = {"written": written, "dropped": distinct.dropped, "near": len(kept_for) - written}
    return {**counts, SKIPPED: distinct.reading.skipped, "groups": list(named.values())[:NUM_GROUPS]}


def _write(out: Path, rows: Iterator[Row], reading: Reading) -> int:
    """A table cannot hold every row as it is, so one is read again before it is in place."""
    if out.suffix.lower() not in TABLES:
        return write_rows(out, rows, why_empty=reading.why_empty, like=reading.source)
    reader, said = RowReader(reading.settings), array("Q")

    def noted() -> Iterator[Row]:
        for row in rows:
            said.append(essence(*reader.parsed(row, Origin("", 0))))
            yield row

    def again(file: Path) -> None:
        read_again(file, out, said, reading.settings)

    return write_rows(out, noted(), again, reading.why_empty, reading.source)


@dataclasses.dataclass
class _Distinct:
    """Rows without those that are the same to the letter as one before them; how many were dropped."""

    reading: Reading
    by_prompt: bool
    dropped: int = 0

    def rows(self) -> Iterator[tuple[Origin, Row, Said]]:
        seen = set[int]()
        self.dropped = 0
        for origin, row, said in self.reading.said():
            rest = () if self.by_prompt else (*said.answers, str(said.label))
            key = hashed(said.rest, said.prompt, *rest)
            if key in seen:
                self.dropped += 1
                continue
            seen.add(key)
            yield origin, row, said


def open_sketches(similarity: float) -> Sketches:
    """Raises ConfigError for what is no similarity, and where the library is missing."""
    if not 0 < similarity <= 1:
        raise ConfigError(f"--similarity {similarity} is none", hint="above 0 and up to 1, e.g. 0.8")
    try:
        return Sketches(DoctorSettings(near_similarity=similarity))
    except ImportError as error:
        raise ConfigError("near duplicates need datasketch", hint="pip install 'posttrain[data]'") from error


def _nearest(distinct: _Distinct, similarity: float) -> np.ndarray:
    """Of each row the number of the one that is kept for it: its own, or an earlier one's that it is like. Its answers
    must be alike as well, for under a long prompt they would not tell; so must its rating and its tools be the same."""
    sketches = open_sketches(similarity)
    settings = sketches.settings
    kinds, whole, answers = array("Q"), [], []
    rows = distinct.rows()
    while chunk := [said for *_, said in islice(rows, CHUNK)]:
        kinds.extend(_kind(said, distinct.by_prompt) for said in chunk)
        parts = [_parts(said, settings, distinct.by_prompt) for said in chunk]
        whole.append(sketches.of(before + after for before, after in parts))
        answers.append(sketches.of(after for _, after in parts))
    if not kinds:
        return np.arange(0)
    kind, said_of, answered = np.frombuffer(kinds, dtype=np.uint64), np.concatenate(whole), np.concatenate(answers)

    def agree(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return (kind[some] == kind[others]) & sketches.alike(answered, some, others)

    alike = sketches.earlier(said_of, agree=agree)
    kept_for = np.arange(len(kind))
    for row in np.flatnonzero(alike >= 0):
        first = kept_for[[alike[row]]]  # which may be left out itself, for one that is less like this row
        one = np.array([row])
        if sketches.alike(said_of, one, first)[0] and agree(one, first)[0]:
            kept_for[row] = first[0]
    return kept_for


def _kind(said: Said, by_prompt: bool) -> int:
    """What must be the same to the letter of two that are alike."""
    return hashed(said.rest) if by_prompt else hashed(said.rest, said.method, str(said.label))


def _parts(said: Said, settings: DoctorSettings, by_prompt: bool) -> tuple[list[bytes], list[bytes]]:
    """Shingles of the prompt and of the answers. Those of a pair's second answer are marked, for a pair turned round
    says the contrary."""
    size = settings.near_words
    asked = shingles(settings.cut(said.prompt), size) if said.prompt else []
    if by_prompt:
        return asked, []
    marked = [(b"\0" * i, answer) for i, answer in enumerate(said.answers, start=1)]
    return asked, [mark + one for mark, answer in marked for one in shingles(settings.cut(answer), size)]
