"""Tools and the calls of them, as rows hold them: lists and objects, or JSON in a text, checked field by field."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from posttrain.data.codes import WRITE_JSON, Row, bad_row, kind
from posttrain.data.strict_json import decode_json
from posttrain.types import Message, Origin

CALL = 'a call is {"type": "function", "function": {"name": "look", "arguments": {"city": "Paris"}}}'
TOOL = 'a tool is {"type": "function", "function": {"name": "look", "description": "...", "parameters": {...}}}'


def with_calls(message: Message, field: str, row: Row, origin: Origin) -> Message:
    """`message` with its calls checked, all of them in `tool_calls`: also those that are JSON in a text, and the single
    one of OpenAI's old `function_call`."""
    if "tool_calls" not in message and "function_call" not in message:
        return message
    clean = {key: value for key, value in message.items() if key != "function_call"}
    calls = _parsed(message.get("tool_calls"), f"{field}.tool_calls", row, origin)
    _check_calls(calls, f"{field}.tool_calls", row, origin)
    single = _parsed(message.get("function_call"), f"{field}.function_call", row, origin)
    if single and calls:
        what, hint = "stands beside `tool_calls`, which says it anew", "keep `tool_calls` alone"
        raise bad_row("E-DATA-0015", origin, what, field=f"{field}.function_call", seen=single, row=row, hint=hint)
    if single:
        calls = [as_call(single, f"{field}.function_call", row, origin)]
    if calls is None:
        clean.pop("tool_calls", None)
        return clean
    if calls and message.get("role") != "assistant":
        key = "function_call" if single else "tool_calls"
        what = f"stands in a message of role {message.get('role')}, but only an assistant calls tools"
        hint = "give the call to the assistant's message, or leave it out; templates write no others"
        raise bad_row("E-DATA-0150", origin, what, field=f"{field}.{key}", seen=message[key], row=row, hint=hint)
    return {**clean, "tool_calls": calls}


def as_call(call: Any, field: str, row: Row, origin: Origin) -> dict[str, Any]:
    """A bare `{"name", "arguments"}` as a tool call, with its `id`, which its result may name. Arguments become an
    object: templates write a text out once more as JSON."""
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not call["name"]:
        what = "is no tool call: an object with a `name` is wanted"
        raise bad_row("E-DATA-0015", origin, what, field=field, seen=call, row=row, hint=CALL)
    written = call.get("arguments", call.get("parameters"))
    arguments = parse_arguments(written, f"{field}.arguments", row, origin)
    named = {"id": call["id"]} if call.get("id") is not None else {}
    return {**named, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _parsed(value: Any, field: str, row: Row, origin: Origin) -> Any:
    """What stands there as JSON in a text, as tables have it; None for an empty text."""
    if not isinstance(value, str):
        return value
    return parse_json(value, field, row, origin) if value.strip() else None


def _check_calls(calls: Any, field: str, row: Row, origin: Origin) -> None:
    """A list of `{"function": {"name", "arguments"}}`, or of the inner objects alone."""
    if calls is None:
        return
    if not isinstance(calls, list):
        what = f"is {kind(calls)}, not a list"
        raise bad_row("E-DATA-0015", origin, what, field=field, seen=calls, row=row, hint=f"write [...]; {CALL}")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            what = "is no tool call: an object with a `name` is wanted"
            raise bad_row("E-DATA-0015", origin, what, field=f"{field}[{i}]", seen=call, row=row, hint=CALL)
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


def parse_tools(row: Row, origin: Origin) -> list[Any] | None:
    """The `tools` column: a list, or one written as JSON (Arrow cannot hold schemas of different shapes)."""
    tools = _parsed(row.get("tools"), "tools", row, origin)
    if not isinstance(tools, list | None):
        raise bad_row("E-DATA-0011", origin, f"is {kind(tools)}, not a list", field="tools", row=row, hint=TOOL)
    for i, tool in enumerate(tools or []):
        _check_tool(tool, f"tools[{i}]", row, origin)
    return tools or None


def _check_tool(tool: Any, field: str, row: Row, origin: Origin) -> None:
    """An object with a name, bare or in OpenAI's wrapping; or a Python function, which transformers describes."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if inspect.isroutine(tool):
        if (reason := _why_unknown(tool)) is None:
            return
        what = f"is a function that cannot be described: {reason}"
    elif not isinstance(function, Mapping):
        what = f"is {kind(tool)}, not a tool"
    elif not isinstance(function.get("name"), str) or not function["name"].strip():
        what = "has no `name`, so that nobody could call it"
    else:
        return
    raise bad_row("E-DATA-0011", origin, what, field=field, seen=tool, row=row, hint=TOOL)


@lru_cache(maxsize=256)
def _why_unknown(function: Any) -> str | None:
    """Why there is no schema of a function: no docstring, an argument without a type, one of Python's own."""
    from transformers.utils import get_json_schema

    try:
        get_json_schema(function)
    except Exception as error:  # whatever stands in somebody's signature and docstring
        return f"{type(error).__name__}: {error}"
    return None


def parse_json(text: str, field: str, row: Row, origin: Origin) -> Any:
    try:
        return decode_json(text)
    except (ValueError, RecursionError) as error:
        what = f"is not valid JSON: {error}"
        raise bad_row("E-DATA-0015", origin, what, field=field, seen=text, row=text, hint=WRITE_JSON) from None
