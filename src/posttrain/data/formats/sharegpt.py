"""ShareGPT: `conversations` whose messages have `from` and `value`, with `system` and `tools` beside them.

Roles are mapped (human → user, gpt → assistant, ...; TRL renames only the keys). A `function_call` becomes a tool call
of the assistant, joined to its words or calls just before; an `observation` becomes a message of role tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.calls import as_call, parse_json, with_calls
from posttrain.data.codes import Row, bad_row
from posttrain.data.conversation import check_answers, map_role
from posttrain.data.flags import normalise
from posttrain.data.formats.build import build
from posttrain.types import Example, Message, Origin

SHAPE = "`conversations` with `from`, `value`"
COLUMN = "conversations"
KEYS, OTHER_KEYS = ("from", "value"), ("role", "content")
"""What a turn has here, and in messages."""
CALLS = ("function_call", "tool_call", "tool_calls")


def matches(row: Row) -> bool:
    conversation = row.get(COLUMN)
    return isinstance(conversation, list) and any(isinstance(m, Mapping) and "from" in m for m in conversation)


def describe(row: Row) -> str:
    return f"read as ShareGPT: column `{COLUMN}` with keys `from`, `value`"


def parse(row: Row, origin: Origin) -> Example:
    messages = read_turns(row.get(COLUMN), COLUMN, row, origin)
    check_answers(messages, COLUMN, row, origin)
    return wrap_tools(build(row, origin, None, messages, {COLUMN}))


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
    extra = {key: value for key, value in turn.items() if key not in (*KEYS, *OTHER_KEYS) and value is not None}
    _check_not_said_twice(turn, role, field, row, origin)
    if role in CALLS:
        _join(messages, _calls(turn["value"], f"{field}.value", row, origin), extra, field, row, origin)
    else:
        message = with_calls({"role": role, "content": turn["value"], **extra}, field, row, origin)
        messages.append(normalise(message, field, row, origin))


def _check_not_said_twice(turn: Mapping[str, Any], role: str, field: str, row: Row, origin: Origin) -> None:
    """Raises DataError for `role` or `content` beside `from` and `value`, unless they say the same."""
    for own, other, said in zip(KEYS, OTHER_KEYS, (role, turn["value"]), strict=True):
        value = turn.get(other)
        same = map_role(value, f"{field}.role", row, origin, extra=CALLS) if value and other == "role" else value
        if value not in (None, "") and same != said:
            what = f"stands beside `{own}`, which says something else"
            raise bad_row("E-DATA-0011", origin, what, field=f"{field}.{other}", seen=value, row=row, hint="keep one")


def _join(
    messages: list[Message], calls: list[dict[str, Any]], extra: Message, field: str, row: Row, origin: Origin
) -> None:
    """Add `calls` to the assistant's message just before, or as one of their own, with what else their turn has."""
    others = normalise(extra, field, row, origin)
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    elif messages[-1].get("train") != others.get("train"):
        what = "is joined to the assistant's words before it, which say otherwise whether to train"
        raise bad_row("E-DATA-0042", origin, what, field=field, row=row, hint="give both the same flag")
    messages[-1] |= {key: value for key, value in others.items() if key not in messages[-1]}
    messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", []), *calls]


def _calls(text: str, field: str, row: Row, origin: Origin) -> list[dict[str, Any]]:
    """The calls written in `text` as JSON: one object with `name` and `arguments`, or a list of them."""
    value = parse_json(text, field, row, origin)
    return [as_call(call, field, row, origin) for call in (value if isinstance(value, list) else [value])]


def _wrap(tool: Any) -> Any:
    """A bare `{"name", "description", "parameters"}` in the form that templates are written for."""
    bare = isinstance(tool, Mapping) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool
