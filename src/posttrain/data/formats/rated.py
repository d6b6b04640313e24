"""Rated answers: `prompt` and `completion`, a conversation, or Alpaca, beside a boolean `label` (true: good).

The label stays in the example's columns. A number, or a word such as "true" or "bad", is meant as a rating and is not
one: such a row is refused by name, for without its label a bad answer would be trained as a good one. Any other text
(`sports`), a list or an object is a column of the user's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.data.codes import Row, bad_row, excerpt
from posttrain.data.formats import alpaca, messages, prompt_completion, sharegpt
from posttrain.types import Example, Origin

SHAPE = "`messages`, `prompt` and `completion`, or Alpaca, with a boolean `label`"
ANSWERS: tuple[Any, ...] = (prompt_completion, sharegpt, messages, alpaca)
BOOLEAN = (bool, np.bool_)
RATINGS = ("true", "false", "yes", "no", "good", "bad", "desirable", "undesirable", "positive", "negative", "chosen",
           "rejected", "t", "f", "y", "n", "")  # fmt: skip


def matches(row: Row) -> bool:
    return is_rating(row.get("label")) and any(fmt.matches(row) for fmt in ANSWERS)


def is_rating(label: object) -> bool:
    """Whether it says, or tries to say, that an answer is good or bad."""
    if isinstance(label, str):
        word = label.strip().lower()
        return word in RATINGS or _is_number(word)
    return isinstance(label, int | float | np.number | np.bool_)


def is_unrated(row: Row) -> bool:
    """Whether a `label` is there and rates nothing: null, or a word of another kind."""
    return "label" in row and (row["label"] is None or isinstance(row["label"], str)) and not is_rating(row["label"])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def describe(row: Row) -> str:
    return f"{_answers(row).describe(row)}, rated by `label`"


def parse(row: Row, origin: Origin) -> Example:
    check_label(row, origin)
    example: Example = _answers(row).parse(row, origin)
    return replace(example, columns={**example.columns, "label": bool(row["label"])})


def check_label(row: Row, origin: Origin) -> None:
    """Raises DataError (E-DATA-0028) for a rating that is no boolean."""
    label = row.get("label")
    if not isinstance(label, BOOLEAN):
        what = f"is {excerpt(label, width=40)!r}, not true or false" if isinstance(label, str) else _seen(row)
        hint = (
            "write true (a good answer) or false (a bad one); if the column is no rating, call it otherwise "
            "(--map label=category) or name the format (--format messages or prompt-completion)"
        )
        raise bad_row("E-DATA-0028", origin, what, field="label", seen=label, row=row, hint=hint)


def _seen(row: Row) -> str:
    if row.get("label") is None:
        return "is null" if "label" in row else "is missing"
    return f"is {excerpt(row['label'], width=40)}, not true or false"


def _answers(row: Row) -> Any:
    return next(fmt for fmt in ANSWERS if fmt.matches(row))
