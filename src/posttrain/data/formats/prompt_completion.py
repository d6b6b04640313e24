"""Prompt and completion: columns `prompt` and `completion`, both text or both lists of messages."""

from __future__ import annotations

from posttrain.data.codes import FILL, Row, bad_row
from posttrain.data.conversation import check_answered, check_answers, clean_messages, says_something
from posttrain.data.formats.build import build, filled_text
from posttrain.types import Example, Message, Origin

SHAPE = "`prompt` and `completion`, both text or both messages"
COLUMNS = {"prompt", "completion"}


def matches(row: Row) -> bool:
    return row.get("prompt") is not None and row.get("completion") is not None


def describe(row: Row) -> str:
    kind = "messages" if isinstance(row["prompt"], list) else "text"
    return f"read as prompt-completion: columns `prompt`, `completion`, both {kind}"


def parse(row: Row, origin: Origin) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        names = {True: "messages", False: "text"}
        what = f"is {names[isinstance(prompt, list)]} but `completion` is {names[isinstance(completion, list)]}"
        hint = "write both as text, or both as lists of messages"
        raise bad_row("E-DATA-0016", origin, what, field="prompt", seen=prompt, row=row, hint=hint)
    if isinstance(completion, list):
        messages = clean_messages(prompt, "prompt", row, origin)
        return build(row, origin, messages, _completion(row, origin), COLUMNS)
    # An empty prompt is fine as text: the completion then stands alone.
    text = "" if prompt == "" else filled_text(row, "prompt", origin, "E-DATA-0014")
    return build(row, origin, text, filled_text(row, "completion", origin, "E-DATA-0013"), COLUMNS)


def _completion(row: Row, origin: Origin) -> list[Message]:
    messages = clean_messages(row["completion"], "completion", row, origin) if row["completion"] else []
    if not any(says_something(message) for message in messages):
        raise bad_row("E-DATA-0013", origin, "is empty", field="completion", row=row, hint=FILL)
    check_answers(messages, "completion", row, origin)
    check_answered(messages, "completion", row, origin)
    return messages
