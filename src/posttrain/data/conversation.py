"""Chat messages as rows hold them: roles mapped to the usual ones, nulls dropped, shape checked field by field."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.data.codes import Row, bad_row, kind
from posttrain.data.flags import normalise, spoken
from posttrain.data.strict_json import decode_json
from posttrain.types import Message, Origin

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "documents")
SYSTEM = ("system", "developer")
ALIASES: dict[str, str] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "tool_output": "tool",
}


def clean_messages(messages: Any, field: str, row: Row, origin: Origin) -> list[Message]:
    """The `role`/`content` messages in column `field` of `row`, checked and without nulls."""
    if not isinstance(messages, list) or not messages:
        what = "is an empty list" if messages == [] else f"is {kind(messages)}, not a list of messages"
        raise bad_row("E-DATA-0011", origin, what, field=field, seen=messages, row=row)
    return [_clean(message, f"{field}[{i}]", row, origin) for i, message in enumerate(messages)]


def _clean(message: Any, field: str, row: Row, origin: Origin) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        what = f"is {kind(message)}, not a message" if not isinstance(message, Mapping) else "has no role"
        hint = 'a message is {"role": "user", "content": "..."}'
        raise bad_row("E-DATA-0011", origin, what, field=field, seen=message, row=row, hint=hint)
    clean = {key: value for key, value in message.items() if value is not None}
    clean["role"] = map_role(message["role"], f"{field}.role", row, origin)
    _check_content(clean, field, row, origin)
    _check_tool_calls(clean.get("tool_calls"), f"{field}.tool_calls", row, origin)
    return normalise(clean, field, row, origin)


def map_role(role: Any, field: str, row: Row, origin: Origin, extra: tuple[str, ...] = ()) -> str:
    """The usual name of `role`; an unknown one is refused, for most templates drop such a message without a word."""
    spelt = role.strip().lower() if isinstance(role, str) else role
    if not isinstance(spelt, str):
        raise bad_row("E-DATA-0012", origin, f"is {kind(role)}, not a role", field=field, seen=role, row=row)
    if spelt in ROLES or spelt in extra:
        return spelt
    if spelt in ALIASES:
        return ALIASES[spelt]
    known = (*ROLES, *ALIASES, *extra)
    similar = difflib.get_close_matches(spelt, known, n=1)
    hint = f'did you mean "{similar[0]}"?' if similar else f"roles: {', '.join(known)}"
    if Path(origin.source).suffix:  # a file, that a command can be given
        words = ["posttrain", "data", "fix", origin.source, "--rule", f"rename-role:{spelt}={[*similar, 'ROLE'][0]}"]
        hint += f"  fix: {shlex.join(words)}"
    what = f"is {json.dumps(role, ensure_ascii=False, default=str)}"
    raise bad_row("E-DATA-0012", origin, what, field=field, seen=role, row=row, hint=hint)


def _check_content(message: Message, field: str, row: Row, origin: Origin) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and len(spoken(message)) > 1):  # tool calls, reasoning
        return
    if not isinstance(content, list):
        what = "is missing" if content is None else f"is {kind(content)}, not text"
        raise bad_row("E-DATA-0011", origin, what, field=f"{field}.content", seen=content, row=row)
    for i, part in enumerate(content):
        part_type = part.get("type") if isinstance(part, Mapping) else kind(part)
        if part_type != "text":
            hint = "only text can be trained on for now"
            where = f"{field}.content[{i}]"
            raise bad_row("E-DATA-0018", origin, f"is of type {part_type}", field=where, row=row, hint=hint)
        if not isinstance(part.get("text"), str):
            what = f"is {kind(part.get('text'))}, not text"
            raise bad_row("E-DATA-0011", origin, what, field=f"{field}.content[{i}].text", row=row)


def _check_tool_calls(calls: Any, field: str, row: Row, origin: Origin) -> None:
    """A list of `{"function": {"name", "arguments"}}`, or of the inner objects alone."""
    if calls is None:
        return
    if not isinstance(calls, list):
        raise bad_row("E-DATA-0015", origin, f"is {kind(calls)}, not a list", field=field, seen=calls, row=row)
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            what = "is no tool call: an object with a `name` is wanted"
            raise bad_row("E-DATA-0015", origin, what, field=f"{field}[{i}]", seen=call, row=row)
        where = f"{field}[{i}].function.arguments" if "function" in call else f"{field}[{i}].arguments"
        parse_arguments(function.get("arguments"), where, row, origin)


def parse_arguments(arguments: Any, field: str, row: Row, origin: Origin) -> Mapping[str, Any]:
    """An object, or one written as JSON (as OpenAI has it): what a model is trained to write must be what a caller can
    read. Null and empty text are calls without arguments."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    parsed = parse_json(arguments, field, row, origin) if isinstance(arguments, str) else arguments
    if not isinstance(parsed, Mapping):
        hint = 'arguments have names: {"city": "Paris"}'
        what = f"is {kind(parsed)}, not an object"
        raise bad_row("E-DATA-0015", origin, what, field=field, seen=arguments, row=row, hint=hint)
    return parsed


def check_answers(messages: list[Message], field: str, row: Row, origin: Origin) -> None:
    """An assistant that says nothing and calls nothing would be trained to stop at once."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train") is not False and not says_something(message):
            hint = 'fill it, give it "train": false, or drop the row (on_bad_row=skip drops and counts such rows)'
            raise bad_row("E-DATA-0013", origin, "says nothing", field=f"{field}[{i}]", row=row, hint=hint)


def says_something(message: Message) -> bool:
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said) or any(message.get(key) for key in ("tool_calls", "reasoning_content", "thinking"))


def parse_tools(row: Row, origin: Origin) -> list[Any] | None:
    """The `tools` column: a list, or one written as JSON (Arrow cannot hold schemas of different shapes)."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, "tools", row, origin) if tools.strip() else None
    if not isinstance(tools, list | None):
        raise bad_row("E-DATA-0011", origin, f"is {kind(tools)}, not a list", field="tools", row=row)
    return tools or None


def parse_json(text: str, field: str, row: Row, origin: Origin) -> Any:
    try:
        return decode_json(text)
    except (ValueError, RecursionError) as error:
        raise bad_row("E-DATA-0015", origin, f"is not valid JSON: {error}", field=field, seen=text, row=text) from None
