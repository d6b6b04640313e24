"""A part of the rows held out, so that nothing in it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.change.reading import SKIPPED, Reading, hashed
from posttrain.data.codes import Row
from posttrain.data.doctor.content import Said
from posttrain.data.settings import DataSettings
from posttrain.data.writing import write_rows
from posttrain.errors import ConfigError, DataError


def split(
    source: Any, share: float, seed: int, folder: Path, settings: DataSettings, by_group: str | None = None
) -> dict[str, int]:
    """Rows as they are into `train.jsonl` and `val.jsonl` of `folder`, about `share` of them into the second: whole
    groups, so that rows with the same prompt (or the same value in column `by_group`) are never on both sides, in
    whatever format they are.

    The rows are read three times; in memory lie eight bytes of each."""
    if not 0 < share < 1:
        raise ConfigError(f"--val {share} is no share", hint="a number between 0 and 1, e.g. 0.1")
    reading = Reading(source, settings)
    keys = np.array([_group(row, said, by_group, settings) for _, row, said in reading.said()], dtype=np.uint64)
    held_out = _groups_to_hold_out(keys, share, seed)
    groups = len(np.unique(keys))
    if not 0 < len(held_out) < groups:
        hint = "every row belongs to one group" if groups == 1 else "take another share"
        raise DataError(f"{source}: {len(keys)} rows cannot be split so", hint=hint, code="E-DATA-0053")
    chosen = np.isin(keys, held_out)
    counts = {}
    for name, wanted in (("train", False), ("val", True)):
        rows = (row for (_, row, _), is_held in zip(reading.said(), chosen, strict=True) if is_held == wanted)
        counts[name] = write_rows(folder / f"{name}.jsonl", rows)
    return {**counts, "groups": groups, SKIPPED: reading.skipped}


def _group(row: Row, said: Said, by_group: str | None, settings: DataSettings) -> int:
    """Of a prompt white space is folded: two that differ in nothing else are nearly the same question, and on one side
    they do no harm."""
    if by_group is None:
        return hashed(" ".join((said.prompt or "".join(said.answers)).split()))
    old_names = {new: old for old, new in settings.column_map.items()}
    column = by_group if by_group in row else old_names.get(by_group, by_group)
    if column not in row:
        raise ConfigError(f"--by-group {by_group!r}: a row has no such column", hint=f"it has {', '.join(row)}")
    return hashed(json.dumps(row[column], sort_keys=True, default=str))


def _groups_to_hold_out(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Groups in random order until they have their share of the rows; as near to it as whole groups allow."""
    groups, sizes = np.unique(keys, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    reached = np.cumsum(sizes[order])
    count = int(np.argmin(np.abs(reached - share * len(keys)))) + 1 if len(groups) else 0
    return groups[order[:count]]
