"""By how much the chosen answer of a pair is better: a number in a column `margin`, for reward models.

No column, or null in it (as tables write what a row has not), is no margin. Numbers in a text, as in CSV, are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.data.codes import bad_row
from posttrain.errors import ConfigError
from posttrain.types import Example, Sample

COLUMN = "margin"
HINT = "a number that says by how much the chosen answer is better"


def with_margin(example: Example) -> Example:
    """`example` with its margin as a number, or without one. Raises DataError (E-DATA-0011)."""
    if COLUMN not in example.columns:
        return example
    seen = example.columns[COLUMN]
    others = {name: value for name, value in example.columns.items() if name != COLUMN}
    if not has_margin(example):
        return replace(example, columns=others)
    value = _number(seen)
    if value is None:
        what = f"is {seen!r}, which is no finite number"
        raise bad_row("E-DATA-0011", example.origin, what, field=COLUMN, seen=seen, row=others | {COLUMN: seen},
                      hint=HINT)  # fmt: skip
    return replace(example, columns={**others, COLUMN: value})


def has_margin(example: Example) -> bool:
    """Whether its column says anything."""
    seen = example.columns.get(COLUMN)
    return seen is not None and not (isinstance(seen, str) and not seen.strip())


def check_alike(samples: Sequence[Sample]) -> None:
    """Raises ConfigError where some pairs have a margin and others have none: what is meant by none nobody can say."""
    without = [sample[0].origin for sample in samples if COLUMN not in sample[0].columns]
    if 0 < len(without) < len(samples):
        raise ConfigError(
            f"{without[0]} has no margin, and {len(samples) - len(without)} of {len(samples)} pairs have one",
            hint="write it on every row (0 where the loss is to be that of no margin), or on none",
        )


def _number(seen: Any) -> float | None:
    if isinstance(seen, bool | np.bool_) or not isinstance(seen, int | float | np.number | str):
        return None
    try:
        value = float(seen)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
