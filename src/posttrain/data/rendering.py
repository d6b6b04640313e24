"""What a template is given, and how its rendering can fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.strict_json import decode_json

Span = tuple[int, int]
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which messages hold a thought."""


class RenderError(ValueError):
    """The template fails on a conversation, or refuses it."""


class LimitError(RenderError):
    """The template takes more time or memory, or writes more, than any conversation needs."""


class BrokenTemplateError(RenderError):
    """The template is no program of Jinja's, whatever it is given: what is wrong, and in which line if that is told."""

    def __init__(self, what: str, line: int | None):
        super().__init__(what)
        self.what, self.line = what, line


def rendered(reply: Mapping[str, Any]) -> Any:
    """The rendering in an answer of jinja.py's. Raises RenderError, LimitError, BrokenTemplateError."""
    if "broken" in reply:
        raise BrokenTemplateError(reply["broken"], reply["line"])
    if "limit" in reply:
        raise LimitError(reply["limit"])
    if "error" in reply:
        raise RenderError(reply["error"])
    return reply["rendered"]


def plain(value: Any) -> Any:
    """`value` rebuilt of plain JSON types, as transformers does it before a template may see it: anything else becomes
    the name of its type, for objects have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():  # numpy's scalars
        return plain(value.item())
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its thought under each of the names that templates ask for."""
    thought = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with the arguments of its calls as objects, also where they are JSON in a text, as OpenAI has them: a
    template that writes arguments as JSON would write such a text as JSON a second time, in quotes."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if calls else message


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    written = function.get("arguments", {})
    if not isinstance(written, str | None):
        return call
    meant = {**function, "arguments": decode_json(written) if written and written.strip() else {}}
    return {**call, "function": meant} if "function" in call else meant
