"""Values written as JSON in a text, as tables have them: which columns they may stand in, and what becomes of them."""

from __future__ import annotations

from typing import Any

from posttrain.data.strict_json import decode_json

CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools")
NESTED = (*CHAT_COLUMNS, "history", "chat_template_kwargs")
"""Columns in which formats look for lists or objects."""
ALWAYS = ("messages", "conversations")
"""A text has no meaning in these."""
AS_TEXT = (*ALWAYS, "history", "chat_template_kwargs")
"""Columns whose text, in files of any kind, is looked at as JSON. Not those where a text may be just that: what TRL
trains as a prompt that begins like JSON is one here too."""


def parsed(name: str, text: str) -> Any:
    """What `text` stands for in column `name`: messages, pairs, arguments; or itself, for a prompt may be text that
    happens to begin like JSON. Raises ValueError where JSON must stand and does not."""
    if name not in NESTED:
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
    if name == "tools":
        return all(isinstance(item, dict) for item in value)
    return bool(value) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
