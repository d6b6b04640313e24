"""What rows are made of: formats, turns, lengths."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from posttrain.data.change.reading import SKIPPED, Reading, Skipped
from posttrain.data.doctor.content import PART, TURN
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.types import Origin

WORDS = re.compile(rf"\w+{PART}(.*?)(?:{PART}.*?)?{TURN}", re.DOTALL)
"""What is said in each turn of canonical text, without the calls and flags after it."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


def stats(source: Any, settings: DataSettings, tokenizer: Any = None, skipped: Skipped | None = None) -> dict[str, Any]:
    """Rows by format, turns, and lengths of prompts, answers and whole rows: in characters, and with a tokenizer in
    tokens as training makes them. `skipped` takes the rows that were skipped: with a tokenizer, by training."""
    reading = Reading(source, settings, skipped)
    formats: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    lengths: dict[str, list[int]] = {"prompt": [], "answer": [], "row": []}
    for *_, said in reading.said():
        formats[said.format] += 1
        turns[said.prompt.count(TURN) + 1] += 1
        lengths["prompt"].append(_characters(said.prompt))
        lengths["answer"] += [_characters(answer) for answer in said.answers]
        lengths["row"].append(said.length)
    result: dict[str, Any] = {
        "rows": sum(formats.values()),
        SKIPPED: reading.skipped,
        "formats": dict(formats),
        "turns": {str(count): rows for count, rows in sorted(turns.items())},
        "characters": {name: _percentiles(values) for name, values in lengths.items()},
    }
    if tokenizer is not None:
        result["tokens"], lengths["tokens"] = _in_tokens(reading, tokenizer)
    result["histogram"] = _histogram(lengths.get("tokens") or lengths["row"])
    return result


def _in_tokens(reading: Reading, tokenizer: Any) -> tuple[dict[str, Any], list[int]]:
    """Also how many rows are left out that are right in themselves, but not with this model."""
    from posttrain.data.pipeline import Pipeline
    from posttrain.data.report import DataReport

    class Noting(DataReport):
        def skip(self, error: DataError, origin: Origin) -> None:
            super().skip(error, origin)
            reading.left_out.add(error, origin)

    alone, report = reading.skipped, Noting("data")
    reading.left_out.clear()
    counts = [tokens.num_tokens for tokens in Pipeline(tokenizer, reading.settings, report).run(reading.source, "data")]
    about = {"row": _percentiles(counts), "total": sum(counts), "trained": report.supervised}
    return {**about, SKIPPED: reading.skipped - alone}, counts


def _characters(canonical: str) -> int:
    """Of what is said, without the names of who says it."""
    if PART not in canonical:
        return len(canonical)
    return sum(len(text) for text in WORDS.findall(canonical))


def _percentiles(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES, method="nearest")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def _histogram(values: list[int], bins: int = 12) -> list[list[int]]:
    """`[from, to, rows]` of each bin, up to the 99th percentile; the rest is in the last."""
    if not values:
        return []
    array = np.array(values)
    low = int(array.min())
    high = max(int(np.percentile(array, 99)), low + 1)
    counts, edges = np.histogram(np.minimum(array, high), bins=min(bins, high - low), range=(low, high))
    return [[int(a), int(b), int(n)] for a, b, n in zip(edges, edges[1:], counts, strict=False)]
