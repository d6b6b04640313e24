"""What rows are made of: formats, turns, lengths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np

from posttrain.data.change.reading import SKIPPED, Reading, Skipped
from posttrain.data.doctor.content import PART, TURN, RowReader
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.types import Origin

WORDS = re.compile(rf"\w+{PART}(.*?)(?:{PART}.*?)?{TURN}", re.DOTALL)
"""What is said in each turn of canonical text, without the calls and flags after it."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


def stats(source: Any, settings: DataSettings, tokenizer: Any = None, skipped: Skipped | None = None) -> dict[str, Any]:
    """Rows by format, turns, and lengths of prompts, answers and whole rows: in characters, and with a tokenizer in
    tokens as training makes them, of each answer of a pair. `skipped` takes the rows that were skipped, which are
    counted nowhere else; with a tokenizer also those that are right in themselves, but not with this model."""
    reading = Reading(source, settings, skipped)
    result, lengths, methods = _of_rows(reading)
    if tokenizer is None:
        return {**result, "histogram": _histogram(lengths)}
    of_model = Skipped()
    tokens, counts, lost = _in_tokens(reading, tokenizer, "sft" not in methods, of_model)
    if lost:
        result, *_ = _of_rows(reading, lost)
        reading.left_out.take(of_model)
    tokens[SKIPPED] = of_model.count
    return {**result, SKIPPED: reading.skipped, "tokens": tokens, "histogram": _histogram(counts)}


def _of_rows(reading: Reading, without: Collection[Origin] = ()) -> tuple[dict[str, Any], list[int], set[str]]:
    """What can be said without a model; the lengths of rows, and the methods that they are for."""
    formats, methods = Counter[str](), set[str]()
    turns: Counter[int] = Counter()
    lengths: dict[str, list[int]] = {"prompt": [], "answer": [], "row": []}
    for origin, _, said in reading.said():
        if origin in without:
            continue
        formats[said.format] += 1
        methods.add(said.method)
        turns[said.prompt.count(TURN) + 1] += 1
        lengths["prompt"].append(_characters(said.prompt))
        lengths["answer"] += [_characters(answer) for answer in said.answers]
        lengths["row"].append(said.length)
    result = {
        "rows": sum(formats.values()),
        SKIPPED: reading.skipped,
        "formats": dict(formats),
        "turns": {str(count): rows for count, rows in sorted(turns.items())},
        "characters": {name: _percentiles(values) for name, values in lengths.items()},
    }
    return result, lengths["row"], methods


def _in_tokens(
    reading: Reading, tokenizer: Any, whole_answers: bool, skipped: Skipped
) -> tuple[dict[str, Any], list[int], set[Origin]]:
    """Also the rows that are left out with this model; of a pair both answers are, where one cannot be used."""
    from posttrain.data.doctor.census import as_trained, trainable_rows
    from posttrain.data.pipeline import Pipeline
    from posttrain.data.report import DataReport

    lost: set[Origin] = set()

    class Noting(DataReport):
        def skip(self, error: DataError, origin: Origin) -> None:
            if origin not in lost:
                lost.add(origin)
                skipped.add(error, origin)

    settings = reading.settings
    pipeline = Pipeline(tokenizer, as_trained(settings, settings.on_bad_row), Noting("data"), whole_answers)
    rows = trainable_rows(reading.source, RowReader(settings))
    made = [(one.origin, one.num_tokens, one.num_supervised) for one in pipeline.run_rows(rows)]
    counts = [(tokens, supervised) for origin, tokens, supervised in made if origin not in lost]
    tokens, supervised = [list(values) for values in zip(*counts, strict=True)] or ([], [])
    return {"row": _percentiles(tokens), "total": sum(tokens), "trained": sum(supervised)}, tokens, lost


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
