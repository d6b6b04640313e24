"""ShareGPT: `conversations` whose messages have `from` and `value`, with `system` and `tools` beside them.

Roles are mapped (human → user, gpt → assistant, ...; TRL renames only the keys). A `function_call` becomes a tool call
of the assistant, joined to its words or calls just before; an `observation` becomes a message of role tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.codes import Row, bad_row, kind
from posttrain.data.conversation import check_answers, map_role, parse_arguments, parse_json
from posttrain.data.flags import DETAIL, KEYS, normalise
from posttrain.data.formats.build import build
from posttrain.types import Example, Message, Origin

SHAPE = "`conversations` with `from`, `value`"
COLUMN = "conversations"
CALLS = ("function_call", "tool_call", "tool_calls")


def matches(row: Row) -> bool:
    conversation = row.get(COLUMN)
    return isinstance(conversation, list) and any(isinstance(m, Mapping) and "from" in m for m in conversation)


def describe(row: Row) -> str:
    return f"read as ShareGPT: column `{COLUMN}` with keys `from`, `value`"


def parse(row: Row, origin: Origin) -> Example:
    messages = read_system(row, origin)
    messages += read_turns(row.get(COLUMN), COLUMN, row, origin)
    check_answers(messages, COLUMN if not row.get("system") else "messages", row, origin)
    return wrap_tools(build(row, origin, None, messages, {COLUMN, "system"}))


def read_system(row: Row, origin: Origin) -> list[Message]:
    """The message in column `system`, where there is one."""
    if not isinstance(row.get("system"), str | None):
        raise bad_row("E-DATA-0011", origin, f"is {kind(row['system'])}, not text", field="system", row=row)
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def read_turns(turns: Any, field: str, row: Row, origin: Origin) -> list[Message]:
    """The `from`/`value` messages in column `field` of `row`, as messages."""
    messages: list[Message] = []
    for i, turn in enumerate(turns if isinstance(turns, list) else [turns]):
        _append(messages, turn, f"{field}[{i}]", row, origin)
    return messages


def wrap_tools(example: Example) -> Example:
    """`example` with bare tools in the form that templates are written for."""
    if example.tools:
        example.tools[:] = [_wrap(tool) for tool in example.tools]
    return example


def _append(messages: list[Message], turn: Any, field: str, row: Row, origin: Origin) -> None:
    if not isinstance(turn, Mapping) or turn.get("from") is None or not isinstance(turn.get("value"), str):
        hint = 'a message here is {"from": "human", "value": "..."}'
        what = "lacks `from` or a text in `value`"
        raise bad_row("E-DATA-0011", origin, what, field=field, seen=turn, row=row, hint=hint)
    role = map_role(turn["from"], f"{field}.from", row, origin, extra=CALLS)
    if role not in CALLS:
        extra = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
        messages.append(normalise({"role": role, "content": turn["value"], **extra}, field, row, origin))
        return
    flags = normalise({key: turn[key] for key in (*KEYS, DETAIL) if key in turn}, field, row, origin)
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": "", **flags})
    elif messages[-1].get("train") != flags.get("train"):
        what = "is joined to the assistant's words before it, which say otherwise whether to train"
        raise bad_row("E-DATA-0042", origin, what, field=field, row=row, hint="give both the same flag")
    messages[-1].setdefault("tool_calls", []).extend(_calls(turn["value"], f"{field}.value", row, origin))


def _calls(text: str, field: str, row: Row, origin: Origin) -> list[dict[str, Any]]:
    """The calls written in `text` as JSON: one object with `name` and `arguments`, or a list of them."""
    value = parse_json(text, field, row, origin)
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, Mapping) or "name" not in call:
            what = "is no tool call: `name` is missing"
            raise bad_row("E-DATA-0015", origin, what, field=field, seen=text, row=text)
    return [{**_id(call), "type": "function", "function": _function(call, field, row, origin)} for call in calls]


def _id(call: Mapping[str, Any]) -> dict[str, Any]:
    """What its result says that it answers (`tool_call_id`)."""
    return {"id": call["id"]} if call.get("id") is not None else {}


def _function(call: Mapping[str, Any], field: str, row: Row, origin: Origin) -> dict[str, Any]:
    """Arguments as an object: templates write a string out once more as JSON."""
    arguments = call.get("arguments", call.get("parameters"))
    return {"name": call["name"], "arguments": parse_arguments(arguments, f"{field}.arguments", row, origin)}


def _wrap(tool: Any) -> Any:
    """A bare `{"name", "description", "parameters"}` in the form that templates are written for."""
    bare = isinstance(tool, Mapping) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool
