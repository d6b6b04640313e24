"""Chat messages as rows hold them: roles mapped to the usual ones, nulls dropped, shape checked field by field."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.data.calls import with_calls
from posttrain.data.codes import AS_TEXT, FILL, SKIP, Row, bad_row, kind
from posttrain.data.flags import DETAIL, normalise, spoken
from posttrain.data.rendering import REASONING
from posttrain.errors import DataError
from posttrain.types import Message, Origin

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "documents")
SYSTEM = ("system", "developer")
NO_CONTENT = ("role", "name", "tool_call_id", "id")
"""Keys of a message that say nothing."""
PART = 'a part is {"type": "text", "text": "..."}'
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

SPEAKERS = (*SYSTEM, "user", "assistant", *(alias for alias, role in ALIASES.items() if role in ("user", "assistant")))
"""Those that are suggested. Not what tools say, which is not trained: whether `response` is an answer or meant as
`tool_response` cannot be told by the letters."""
MISSPELT = 0.8
"""How much a role must be like a known one to be taken for a slip of the pen: `assitant` is 0.94, `moderator` and
`observation` are 0.6."""


def clean_messages(messages: Any, field: str, row: Row, origin: Origin) -> list[Message]:
    """The `role`/`content` messages in column `field` of `row`, checked and without nulls."""
    if not isinstance(messages, list) or not messages:
        what = "is an empty list" if messages == [] else f"is {kind(messages)}, not a list of messages"
        hint = FILL if messages == [] else 'write a list: [{"role": "user", "content": "..."}, ...]'
        raise bad_row("E-DATA-0011", origin, what, field=field, seen=messages, row=row, hint=hint)
    cleaned = [_clean(message, f"{field}[{i}]", row, origin) for i, message in enumerate(messages)]
    if any(isinstance(message, Mapping) and message.get("function_call") for message in messages):
        for message in cleaned:  # what was called in the old way is answered in the new one
            message["role"] = "tool" if message["role"] == "function" else message["role"]
    return cleaned


def _clean(message: Any, field: str, row: Row, origin: Origin) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        what = f"is {kind(message)}, not a message" if not isinstance(message, Mapping) else "has no role"
        hint = 'a message is {"role": "user", "content": "..."}'
        raise bad_row("E-DATA-0011", origin, what, field=field, seen=message, row=row, hint=hint)
    clean = {key: value for key, value in message.items() if value is not None}
    clean["role"] = map_role(message["role"], f"{field}.role", row, origin)
    clean = with_calls(clean, field, row, origin)
    _check_content(clean, field, row, origin)
    return normalise(clean, field, row, origin)


def map_role(role: Any, field: str, row: Row, origin: Origin, extra: tuple[str, ...] = ()) -> str:
    """The usual name of `role`; an unknown one is refused, for most templates drop such a message without a word."""
    spelt = role.strip().lower() if isinstance(role, str) else role
    if not isinstance(spelt, str):
        hint = f"roles: {', '.join(ROLES)}"
        raise bad_row("E-DATA-0012", origin, f"is {kind(role)}, not a role", field=field, seen=role, row=row, hint=hint)
    if spelt in ROLES or spelt in extra:
        return spelt
    if spelt in ALIASES:
        return ALIASES[spelt]
    known = (*ROLES, *ALIASES, *extra)
    similar = difflib.get_close_matches(spelt, SPEAKERS, n=1, cutoff=MISSPELT)
    hint = f'did you mean "{similar[0]}"?' if similar else f"roles: {', '.join(known)}"
    if Path(origin.source).suffix:  # a file, that a command can be given
        words = ["posttrain", "data", "fix", origin.source, "--rule", f"rename-role:{spelt}={[*similar, 'ROLE'][0]}"]
        hint += f"  fix: {shlex.join(words)}"
    what = f"is {json.dumps(role, ensure_ascii=False, default=str)}"
    raise bad_row("E-DATA-0012", origin, what, field=field, seen=role, row=row, hint=hint)


def _check_content(message: Message, field: str, row: Row, origin: Origin) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and any(message.get(key) for key in ("tool_calls", *REASONING))):
        return
    if not isinstance(content, list):
        what = "is missing" if content is None else f"is {kind(content)}, not text"
        raise bad_row("E-DATA-0011", origin, what, field=f"{field}.content", seen=content, row=row,
                      hint=_elsewhere(message) if content is None else AS_TEXT)  # fmt: skip
    for i, part in enumerate(content):
        _check_part(part, f"{field}.content[{i}]", row, origin)


def _elsewhere(message: Message) -> str:
    """What a message without content seems to call it."""
    said = next((key for key, value in spoken(message).items()
                 if key not in NO_CONTENT and isinstance(value, str) and value.strip()), None)  # fmt: skip
    return (
        f'call it "content" if `{said}` is what is said' if said else 'a message is {"role": "user", "content": "..."}'
    )


def _check_part(part: Any, field: str, row: Row, origin: Origin) -> None:
    if not isinstance(part, Mapping) or part.get("type") is None:
        what = "has no `type`" if isinstance(part, Mapping) else f"is {kind(part)}, not a part"
        raise bad_row("E-DATA-0011", origin, what, field=field, seen=part, row=row, hint=PART)
    if part["type"] != "text":
        hint = "only text can be trained on for now"
        raise bad_row("E-DATA-0018", origin, f"is of type {part['type']}", field=field, row=row, hint=hint)
    if not isinstance(part.get("text"), str):
        what = f"is {kind(part.get('text'))}, not text"
        raise bad_row("E-DATA-0011", origin, what, field=f"{field}.text", row=row, hint=PART)


def check_answers(messages: list[Message], field: str, row: Row, origin: Origin) -> None:
    """An assistant that says nothing and calls nothing would be trained to stop at once."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train") is not False and not says_something(message):
            hint = f'fill it, give it "train": false, or drop the row ({SKIP} drops and counts such rows)'
            raise bad_row("E-DATA-0013", origin, "says nothing", field=f"{field}[{i}]", row=row, hint=hint)


def says_something(message: Message) -> bool:
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said) or any(message.get(key) for key in ("tool_calls", *REASONING))


def is_answered(messages: list[Message]) -> bool:
    """Whether anything of it is to be trained: by the messages' flags, where they have any, else by their roles."""
    return any(map(_is_trained, messages))


def _is_trained(message: Message) -> bool:
    flag = message.get("train", message["role"] == "assistant")
    return flag is not False or any(train for *_, train in message.get(DETAIL, ()))


def check_answered(messages: list[Message], field: str, row: Row, origin: Origin) -> None:
    """What follows a prompt is to be said by the assistant: others' turns alone are no answer."""
    if not is_answered(messages):
        raise unanswered(messages, field, row, origin)


def unanswered(messages: list[Message], field: str | None, row: object, origin: Origin) -> DataError:
    """The complaint about messages of which nothing is to be trained."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    what = "holds no turn of the assistant to train"
    hint = "add the answer, or drop the row; a prompt alone is data for GRPO, RLOO or PPO"
    if answers:
        which = f"the only one, [{answers[0]}]," if len(answers) == 1 else f"each of its {len(answers)}"
        what = f'{what}: {which} says "train": false (or "weight": 0)'
        hint = f"take this flag out where an answer is to be trained, or drop the row ({SKIP} drops and counts them)"
    return bad_row("E-DATA-0022", origin, what if field else f"the row {what}", field=field, row=row, hint=hint)


def with_system(messages: list[Message], row: Row, origin: Origin) -> list[Message]:
    """`messages` behind the system message in column `system`, where there is one. Raises DataError (E-DATA-0032) where
    the conversation has another of its own: which of the two is meant cannot be told."""
    said = row.get("system")
    if not isinstance(said, str | None):
        hint = "a system message is text; a column of another meaning wants another name: --map system=own_system"
        raise bad_row(
            "E-DATA-0011", origin, f"is {kind(said)}, not text", field="system", seen=said, row=row, hint=hint
        )
    if said is None or not said.strip():
        return messages
    own = [message.get("content") for message in messages if message["role"] in SYSTEM]
    if not own:
        return [{"role": "system", "content": said}, *messages]
    if len(own) > 1 or not isinstance(own[0], str) or own[0].strip() != said.strip():
        what = "stands beside a system message of the conversation's own, which says something else"
        hint = "keep one of them; to leave the column out, --map system=own_system"
        raise bad_row("E-DATA-0032", origin, what, field="system", seen=said, row=row, hint=hint)
    return messages
