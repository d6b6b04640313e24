"""Rows that come as token ids: `input_ids`, and what says which of them are trained.

That is `labels` where they are given, else the masks as TRL heeds them: `assistant_masks` always, `completion_mask`
where `completion_only_loss=True` asks for it. A `loss_mask` leaves tokens out of either. Where `attention_mask` is 0
there is padding, which is dropped: sequences are laid end to end here, without any.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.data.codes import Row, bad_row
from posttrain.data.encode import EMPTY
from posttrain.data.render import Supervision
from posttrain.errors import ConfigError
from posttrain.types import Branch, Origin, Tokenized

IGNORED = -100
MASKS = ("attention_mask", "loss_mask", "assistant_masks", "completion_mask")
COLUMNS = ("input_ids", "labels", *MASKS)
PADDING = "attention_mask"


def is_tokenized(row: Row) -> bool:
    return row.get("input_ids") is not None


def from_tokens(
    row: Row, origin: Origin, supervision: Supervision, num_tokens: int | None, columns: tuple[str, ...]
) -> Tokenized:
    """The tokens of `row`. `num_tokens` is the vocabulary's size; None where no tokenizer is known."""
    ids = _ids(row, origin, num_tokens)
    masks = {name: _mask(row, name, ids, origin) for name in MASKS if row.get(name) is not None}
    labelled = row.get("labels") is not None
    supervised = _from_labels(row, ids, origin) if labelled else np.ones(len(ids), dtype=bool)
    wanted = ["loss_mask"] if labelled else ["loss_mask", *_needed(masks, origin, supervision)]
    for name in wanted:
        supervised &= masks.get(name, True)
    there = _not_padding(masks[PADDING], row, origin) if PADDING in masks else slice(None)
    kept = {column: row[column] for column in columns if column in row}
    return Tokenized(EMPTY, (Branch(ids[there].astype(np.int32), supervised[there]),), origin, kept)


def not_heeded(row: Row, supervision: Supervision) -> list[str]:
    """Masks of `row` that its tokens are trained without."""
    others: tuple[str, ...] = ("assistant_masks", "completion_mask") if row.get("labels") is not None else ()
    if not others and supervision.completion_only is not True:
        others = ("completion_mask",)
    return [name for name in others if row.get(name) is not None]


def _needed(masks: dict[str, np.ndarray], origin: Origin, supervision: Supervision) -> list[str]:
    wanted = {"completion_mask": supervision.completion_only is True, "assistant_masks": supervision.assistant_only}
    for name, needed in wanted.items():
        if needed and name not in masks:
            message = f"{origin}: the row has `input_ids`, but neither `labels` nor the `{name}` that the loss needs"
            raise ConfigError(message, hint="add the mask, or give text or messages instead of tokens")
    return ["assistant_masks", *(["completion_mask"] if wanted["completion_mask"] else [])]


def _ids(row: Row, origin: Origin, num_tokens: int | None) -> np.ndarray:
    ids = _integers(row, "input_ids", origin)
    last = ids.max(initial=0) if num_tokens is None else num_tokens - 1
    if len(ids) and not (ids.min() >= 0 and ids.max() <= last):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        known = "" if num_tokens is None else f", but the tokenizer has ids 0 to {last}"
        raise bad_row("E-DATA-0025", origin, f"holds {wrong}{known or ', which is no id'}", field="input_ids", row=row)
    return ids


def _from_labels(row: Row, ids: np.ndarray, origin: Origin) -> np.ndarray:
    labels = _same_length(row, "labels", ids, origin)
    supervised: np.ndarray = labels != IGNORED
    wrong = np.flatnonzero(supervised & (labels != ids))
    if len(wrong):
        i = int(wrong[0])
        what = f"is {labels[i]} but input_ids[{i}] is {ids[i]}: a label is {IGNORED} or the token itself"
        raise bad_row("E-DATA-0025", origin, what, field=f"labels[{i}]", row=row)
    return supervised


def _mask(row: Row, name: str, ids: np.ndarray, origin: Origin) -> np.ndarray:
    values = _same_length(row, name, ids, origin, kinds="iub")
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        i = int(wrong[0])
        what, hint = f"is {values[i]}, neither 0 nor 1", "a token is trained or it is not"
        raise bad_row("E-DATA-0025", origin, what, field=f"{name}[{i}]", row=row, hint=hint)
    found: np.ndarray = values != 0
    return found


def _not_padding(mask: np.ndarray, row: Row, origin: Origin) -> slice:
    """Where the tokens are that are no padding, which can only stand before or behind them."""
    there = np.flatnonzero(mask)
    if not len(there):
        raise bad_row("E-DATA-0025", origin, "is 0 everywhere: there is padding only", field=PADDING, row=row)
    first, last = int(there[0]), int(there[-1])
    if len(there) != last - first + 1:
        hole = first + int(np.flatnonzero(~mask[first:])[0])
        what = "is 0 between tokens where it is 1: a token that others do not see cannot be trained on here"
        hint = "take such tokens out; to leave them out of the loss, use `loss_mask` or `labels`"
        raise bad_row("E-DATA-0025", origin, what, field=f"{PADDING}[{hole}]", row=row, hint=hint)
    return slice(first, last + 1)


def _same_length(row: Row, column: str, ids: np.ndarray, origin: Origin, kinds: str = "iu") -> np.ndarray:
    values = _integers(row, column, origin, kinds)
    if len(values) != len(ids):
        what = f"has {len(values)} elements, `input_ids` {len(ids)}"
        raise bad_row("E-DATA-0025", origin, what, field=column, row=row)
    return values


def _integers(row: Row, column: str, origin: Origin, kinds: str = "iu") -> np.ndarray:
    value: Any = row[column]
    try:
        array = np.asarray(value) if len(value) else EMPTY
    except (TypeError, ValueError, OverflowError):  # a number; lists of different lengths
        array = np.zeros(0)
    is_mixed = "b" not in kinds and bool in set(map(type, value)) if array.ndim == 1 and len(array) else False
    if array.ndim != 1 or array.dtype.kind not in kinds or is_mixed:  # numpy makes 1 of a True among integers
        raise bad_row("E-DATA-0025", origin, "is not a list of integers", field=column, row=row)
    return array.astype(np.int64)
