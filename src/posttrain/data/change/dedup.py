"""Rows that say what one before them says, left out: the same to the letter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.data.change.reading import SKIPPED, Reading, hashed
from posttrain.data.codes import Row
from posttrain.data.settings import DataSettings
from posttrain.data.writing import write_rows


def dedup(source: Any, out: Path, settings: DataSettings, by_prompt: bool = False) -> dict[str, int]:
    """Rows as they are, without those that say what one before them says (or ask it, with `by_prompt`), in whatever
    format. White space counts, but for that at the two ends of a text: it is what code and tables are made of."""
    reading, seen, dropped = Reading(source, settings), set[int](), 0

    def first_ones() -> Iterator[Row]:
        nonlocal dropped
        for row, said in reading.said():
            rest = () if by_prompt else (*said.answers, str(said.label), said.rest)
            key = hashed(said.prompt, *rest)
            if key in seen:
                dropped += 1
                continue
            seen.add(key)
            yield row

    return {"written": write_rows(out, first_ones()), "dropped": dropped, SKIPPED: reading.skipped}
