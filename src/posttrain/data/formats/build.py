"""What all formats share: the columns that belong to none of them (the system message, tools, template arguments, the
user's own)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.calls import parse_tools
from posttrain.data.codes import AS_TEXT, FILL, Row, bad_row, kind
from posttrain.data.conversation import with_system
from posttrain.types import Content, Example, Origin

SHARED = ("system", "tools", "chat_template_kwargs")
"""What belongs to a conversation, whatever its format. Text has no place for them."""


def build(row: Row, origin: Origin, prompt: Content | None, completion: Content, used: set[str]) -> Example:
    """The example of `row`. Columns that the format has not `used` stay with it under their names."""
    if not isinstance(completion, list):
        return Example(prompt, (completion,), origin, columns=_others(row, used))
    if isinstance(prompt, list):
        prompt = with_system(prompt, row, origin)
    else:
        completion = with_system(completion, row, origin)
    return Example(
        prompt=prompt,
        completions=(completion,),
        origin=origin,
        tools=parse_tools(row, origin),
        template_kwargs=_template_kwargs(row, origin),
        columns=_others(row, used.union(SHARED)),
    )


def _others(row: Row, used: set[str]) -> Row:
    return {key: value for key, value in row.items() if key not in used}


def filled_text(row: Row, column: str, origin: Origin, code: str) -> str:
    """The text in `column`, which must hold more than white space."""
    value = row.get(column)
    if not isinstance(value, str):
        what = "is missing" if value is None else f"is {kind(value)}, not text"
        hint = FILL if value is None else AS_TEXT
        raise bad_row("E-DATA-0011", origin, what, field=column, seen=value, row=row, hint=hint)
    if not value.strip():
        raise bad_row(code, origin, "is empty", field=column, row=row, hint=FILL)
    return value


def _template_kwargs(row: Row, origin: Origin) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        what = f"is {kind(kwargs)}, not an object"
        hint = 'name them: {"enable_thinking": false}'
        raise bad_row("E-DATA-0011", origin, what, field="chat_template_kwargs", seen=kwargs, row=row, hint=hint)
    return {key: value for key, value in kwargs.items() if value is not None}
