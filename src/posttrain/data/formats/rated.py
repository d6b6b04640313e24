"""Rated answers: `prompt` and `completion`, or a conversation, beside a boolean `label` (true: good).

The label stays in the example's columns. Other values of `label` are the user's own column and mean nothing here.
"""

from __future__ import annotations

from typing import Any

from posttrain.data.codes import Row
from posttrain.data.formats import messages, prompt_completion, sharegpt
from posttrain.types import Example, Origin

SHAPE = "`messages`, or `prompt` and `completion`, with a boolean `label`"
ANSWERS: tuple[Any, ...] = (prompt_completion, sharegpt, messages)


def matches(row: Row) -> bool:
    return isinstance(row.get("label"), bool) and any(fmt.matches(row) for fmt in ANSWERS)


def describe(row: Row) -> str:
    return f"{_answers(row).describe(row)}, rated by `label`"


def parse(row: Row, origin: Origin) -> Example:
    example: Example = _answers(row).parse(row, origin)
    return example


def _answers(row: Row) -> Any:
    return next(fmt for fmt in ANSWERS if fmt.matches(row))
