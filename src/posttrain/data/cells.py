"""Values written as JSON in a text, as tables have them: which columns they may stand in, and what becomes of them."""

from __future__ import annotations

import re
from typing import Any

from posttrain.data.codes import Row
from posttrain.data.strict_json import decode_json

ANSWERS = ("completion", "chosen", "rejected")
SPOKEN = ("prompt", *ANSWERS)
"""Columns of messages, or of a text that is just that."""
CHAT_COLUMNS = ("messages", "conversations", *SPOKEN, "tools")
NESTED = (*CHAT_COLUMNS, "history", "chat_template_kwargs")
"""Columns in which formats look for lists or objects."""
ALWAYS = ("messages", "conversations")
"""A text has no meaning in these."""
AS_TEXT = (*ALWAYS, "history", "chat_template_kwargs")
"""Columns whose text, in files of any kind, is looked at as JSON by itself; those of `SPOKEN`: `with_messages`."""
MESSAGES = re.compile(r"\s*\[\s*\{")
KEYS = (("role", "content"), ("role", "tool_calls"), ("from", "value"))
"""What a message has."""


def parsed(name: str, text: str) -> Any:
    """What `text` stands for in column `name`, whatever else the row holds: messages, pairs, arguments, or itself.
    Raises ValueError where JSON must stand and does not."""
    if name not in NESTED or name in SPOKEN:
        return text
    if not text.strip() and name in ("history", "chat_template_kwargs"):
        return None
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        value = decode_json(text)
    except (ValueError, RecursionError):
        if name in ALWAYS:
            raise
        return text
    return value if name in ALWAYS or _is_meant(name, value) else text


def _is_meant(name: str, value: Any) -> bool:
    if name == "chat_template_kwargs":
        return isinstance(value, dict)
    if not isinstance(value, list):
        return False
    if name == "history":
        return all(isinstance(pair, list) for pair in value)
    return name == "tools" and all(isinstance(item, dict) for item in value)


def with_messages(row: Row) -> Row:
    """`row` with prompt and answers that are wholly JSON lists of messages as these messages. A prompt may be text
    that happens to be such a list, and so may an answer: they are meant as messages where all answers of the row are,
    and the prompt of a completion is."""
    found = {name: said for name in SPOKEN if (said := written_messages(row.get(name))) is not None}
    if not found:
        return row
    answers = [name for name in ANSWERS if row.get(name) is not None]
    wanted = [*answers, "prompt"] if "completion" in answers else answers
    is_meant = all(name in found or isinstance(row.get(name), list) for name in wanted)
    return {**row, **found} if is_meant and answers else row


def written_messages(value: Any) -> list[Any] | None:
    """The messages that a text holds as JSON, and nothing else; None for all else."""
    if not isinstance(value, str) or not MESSAGES.match(value):
        return None
    try:
        found = decode_json(value)
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(found, list) and all(
        isinstance(item, dict) and any(item.keys() >= {*keys} for keys in KEYS) for item in found
    )
    return found if is_one else None
