"""Rows that come as token ids: `input_ids`, and `labels` or the masks `completion_mask` and `assistant_masks`."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.data.codes import Row, bad_row
from posttrain.data.encode import EMPTY
from posttrain.data.render import Supervision
from posttrain.errors import ConfigError
from posttrain.types import Branch, Origin, Tokenized

IGNORED = -100


def is_tokenized(row: Row) -> bool:
    return row.get("input_ids") is not None


def from_tokens(
    row: Row, origin: Origin, supervision: Supervision, num_tokens: int, columns: tuple[str, ...]
) -> Tokenized:
    """`labels` decide where they are given. Of the masks, as in TRL, `assistant_masks` always counts and
    `completion_mask` only where `completion_only_loss=True` asks for it. `num_tokens` is the vocabulary's size."""
    ids = _integers(row, "input_ids", origin)
    if len(ids) and not (ids.min() >= 0 and ids.max() < num_tokens):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        what = f"holds {wrong}, but the tokenizer has ids 0 to {num_tokens - 1}"
        raise bad_row("E-DATA-0025", origin, what, field="input_ids", row=row)
    supervised = np.ones(len(ids), dtype=bool)
    if row.get("labels") is not None:
        supervised = _from_labels(row, ids, origin)
    else:
        for column in _masks(row, origin, supervision):
            supervised &= _same_length(row, column, ids, origin) != 0
    kept = {column: row[column] for column in columns if column in row}
    return Tokenized(EMPTY, (Branch(ids, supervised),), origin, kept)


def _masks(row: Row, origin: Origin, supervision: Supervision) -> list[str]:
    wanted = {"completion_mask": supervision.completion_only is True, "assistant_masks": supervision.assistant_only}
    for column, needed in wanted.items():
        if needed and row.get(column) is None:
            message = f"{origin}: the row has `input_ids`, but neither `labels` nor the `{column}` that the loss needs"
            raise ConfigError(message, hint="add the mask, or give text or messages instead of tokens")
    always = ["assistant_masks"] if row.get("assistant_masks") is not None else []
    return always + (["completion_mask"] if wanted["completion_mask"] else [])


def _from_labels(row: Row, ids: np.ndarray, origin: Origin) -> np.ndarray:
    labels = _same_length(row, "labels", ids, origin)
    supervised: np.ndarray = labels != IGNORED
    wrong = np.flatnonzero(supervised & (labels != ids))
    if len(wrong):
        i = int(wrong[0])
        what = f"is {labels[i]} but input_ids[{i}] is {ids[i]}: a label is {IGNORED} or the token itself"
        raise bad_row("E-DATA-0025", origin, what, field=f"labels[{i}]", row=row)
    return supervised


def _same_length(row: Row, column: str, ids: np.ndarray, origin: Origin) -> np.ndarray:
    values = _integers(row, column, origin)
    if len(values) != len(ids):
        what = f"has {len(values)} elements, `input_ids` {len(ids)}"
        raise bad_row("E-DATA-0025", origin, what, field=column, row=row)
    return values


def _integers(row: Row, column: str, origin: Origin) -> np.ndarray:
    value: Any = row[column]
    try:
        array = np.asarray(value) if len(value) else EMPTY
    except (TypeError, ValueError):  # a number; lists of different lengths
        array = np.zeros(0)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise bad_row("E-DATA-0025", origin, "is not a list of integers", field=column, row=row)
    return array.astype(np.int32)
