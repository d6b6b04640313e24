"""Rows of every method as the model sees them: preference pairs as two sequences beside one another, rated answers with
their label, all others as supervised training has them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posttrain.data.codes import UNFORESEEN, Row, broken_promise
from posttrain.data.columns import read_columns
from posttrain.data.formats import Format, all_formats, choose, detect, preference, rated, require
from posttrain.data.ratings import ratings_of
from posttrain.data.settings import DataSettings
from posttrain.data.tokens import is_tokenized
from posttrain.data.view import PairView, RowView, View, token_view
from posttrain.errors import DataError, UserError
from posttrain.types import Content, Example, Origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME = "chosen and rejected are the same tokens: there is nothing to learn from this pair (E-DATA-0060)"


def any_view(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings | None = None,
    train_on: str = "assistant",
    origin: Origin | None = None,
) -> View:
    """`token_view` of a row of any method. Raises ConfigError for settings that do not fit."""
    settings, origin = settings or DataSettings(), origin or Origin("row", 0)
    if settings.formatting_func is not None or is_tokenized(row):
        return token_view(row, tokenizer, settings, train_on, origin)
    try:
        given, row = row, read_columns(row, settings.column_map, origin)
        table = all_formats(settings.text_field)
        found = choose(settings.format, table) or detect(row, origin, table)
        if found not in (preference, rated):
            return token_view(given, tokenizer, settings, train_on, origin)
        require(found, settings.format, row, origin)
        example = _parsed(found, row, origin)
        if found is rated:  # by its last turn
            (example,) = ratings_of(example)
    except DataError as error:
        return RowView(str(origin), error=error)
    settings = replace(
        settings, format="auto", text_field="text", column_map={}
    )  # the parts of an example have usual names
    sides = [
        token_view(_as_row(example, answer), tokenizer, settings, train_on, origin, whole_answers=True, is_read=True)
        for answer in example.completions
    ]
    if failed := next((side for side in sides if side.error is not None), None):
        return failed
    sides = [replace(side, notes=(found.describe(row), *side.notes[1:])) for side in sides]  # not as one answer was
    return _pair(*sides) if len(sides) == 2 else replace(sides[0], label=example.columns.get("label"))


def _parsed(found: Format, row: Row, origin: Origin) -> Example:
    try:
        return found.parse(row, origin)
    except UserError:
        raise
    except UNFORESEEN as error:
        raise broken_promise(error, row, origin) from error


def _as_row(example: Example, answer: Content) -> dict[str, Any]:
    """One answer of `example` as a row that supervised training reads."""
    extra = {"tools": example.tools, "chat_template_kwargs": dict(example.template_kwargs)}
    used = {name: value for name, value in extra.items() if value}
    if example.prompt is None:
        return {"messages" if isinstance(answer, list) else "text": answer, **used}
    return {"prompt": example.prompt, "completion": answer, **used}


def _pair(chosen: RowView, rejected: RowView) -> PairView:
    ids = [[piece.id for piece in side.pieces] for side in (chosen, rejected)]
    shortest = min(map(len, ids))
    shared = next((i for i in range(shortest) if ids[0][i] != ids[1][i]), shortest)
    notes = (SAME,) if ids[0] == ids[1] else ()
    sides = [
        replace(side, pieces=tuple(replace(piece, shared=i < shared) for i, piece in enumerate(side.pieces)))
        for side in (chosen, rejected)
    ]
    return PairView(chosen.origin, replace(sides[0], notes=(*sides[0].notes, *notes)), sides[1], shared)
