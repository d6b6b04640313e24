"""Messages (OpenAI, ChatML): a column `messages`, or `conversations`, whose messages have `role` and `content`."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.data.codes import Row
from posttrain.data.conversation import check_answers, clean_messages
from posttrain.data.formats.build import build
from posttrain.types import Example, Origin

SHAPE = "`messages` with `role`, `content`"
COLUMNS = ("messages", "conversations", "conversation")


def matches(row: Row) -> bool:
    return _column(row) is not None


def describe(row: Row) -> str:
    return f"read as messages: column `{_column(row)}` with keys `role`, `content`"


def parse(row: Row, origin: Origin) -> Example:
    column = _column(row) or "messages"
    messages = clean_messages(row.get(column), column, row, origin)
    check_answers(messages, column, row, origin)
    return build(row, origin, None, messages, {column})


def _column(row: Row) -> str | None:
    """The first column that holds messages, or tries to: a broken one is to be named, not passed over."""
    if isinstance(row.get("messages"), list):
        return "messages"
    return next((column for column in COLUMNS if _has_roles(row.get(column))), None)


def _has_roles(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(message, Mapping) and "role" in message for message in value)
