"""What must survive a change of format: who says what, calls and tools with their ids, names, flags, ratings, and how
many answers there are.

Left out: how it is written. `arguments` are the same as an object and as JSON in a text, a call alone and within
`function`.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from posttrain.data.change.reading import hashed
from posttrain.data.doctor.content import Said, as_messages
from posttrain.types import Content, Example, Message


def essence(example: Example, said: Said) -> int:
    """A number that is the same for examples that train the same."""
    if example.prompt is None and isinstance(example.completions[0], str):
        conversations: list[Any] = [example.completions[0]]
    else:
        before = _turns(example.prompt or [], "user", is_given=True)
        conversations = [before + _turns(answer, "assistant") for answer in example.completions]
    if said.method != "sft":  # the last turn is compared, or rated, whatever flags say
        for turn in (turn for turns in conversations for turn in turns if isinstance(turn, dict)):
            turn.pop("train", None)
    tools = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in example.tools or []]
    parts = [said.method, said.label, conversations, tools, dict(example.template_kwargs)]
    return hashed(json.dumps(parts, sort_keys=True, default=str))


def _turns(content: Content, role: str, is_given: bool = False) -> list[dict[str, Any]]:
    """Each with whether it is trained: by its flag, else the assistant's, but for those of a prompt (`is_given`)."""
    return [
        {**_turn(message), "train": bool(message.get("train", message["role"] == "assistant" and not is_given))}
        for message in as_messages(content, role)
    ]


def _turn(message: Message) -> dict[str, Any]:
    turn = {key: value for key, value in message.items() if value is not None}
    turn["content"] = message.get("content") or ""
    if message.get("tool_calls"):
        turn["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return turn


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Name, arguments and whatever else it has, an id above all, which some templates write."""
    function = call.get("function", {})
    one = {**{key: value for key, value in call.items() if key not in ("type", "function")}, **function}
    arguments = one.pop("parameters", None) if one.get("arguments") is None else one["arguments"]
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return {key: value for key, value in one.items() if value is not None} | {"arguments": arguments or {}}
