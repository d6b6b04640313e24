"""What a row holds that its format has no place for. Most of it is the user's own (an id, a source) and of no account;
what looks meant is named: columns that other formats know, and whole formats beside the one that was read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.codes import UNFORESEEN, Row
from posttrain.data.formats import Format
from posttrain.errors import DataError
from posttrain.types import Content, Example

MEANT: Mapping[str, str | None] = {
    "system": None,
    "system_prompt": "system",
    "system_message": "system",
    "instructions": None,
    "context": "input",
    "history": None,
    "tools": None,
    "functions": "tools",
    "tool_calls": None,
    "function_call": None,
    "documents": None,
    "chat_template_kwargs": None,
    "reasoning": None,
    "reasoning_content": None,
    "thinking": None,
    "train": None,
    "weight": None,
    "loss_mask": None,
    "labels": None,
    "attention_mask": None,
    "assistant_masks": None,
    "completion_mask": None,
    "position_ids": None,
    "seq_lengths": None,
}
"""Columns that seem to say something to the model or about the loss, and the name under which they are read, if any."""
SAID = ("prompt", "completion", "instruction", "input", "output", "question", "answer", "response")
"""Columns that other rows are made of. Often they say once more what a conversation says; else they look meant."""
IN_A_MESSAGE = ("tools", "functions")
NO_PLACE = "which their format has no place for, so that nothing is made of it"


@dataclass(frozen=True, slots=True)
class PassedOver:
    """`columns` are all that nothing is made of, `meant` those of them (and keys of messages) that look meant,
    `formats` those that the row could be read as, too, with other words."""

    columns: tuple[str, ...] = ()
    meant: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


NOTHING = PassedOver()


def passed_over(
    example: Example, known: Mapping[str, Format], kept: Collection[str] = (), is_named: bool = False
) -> PassedOver:
    """What nothing is made of in the row of `example`. `known` are the formats of all methods, `kept` the columns that
    its method looks at. Where its format `is_named` by the user, other formats were seen and not meant."""
    in_messages = _in_messages(example)
    rest = {name: value for name, value in example.columns.items() if name not in kept and not _is_empty(value)}
    if not rest:
        return PassedOver(meant=in_messages) if in_messages else NOTHING
    if is_named:
        return PassedOver(tuple(rest), (*_meant(rest), *in_messages))
    others = tuple(name for name, fmt in known.items() if fmt.matches(rest) and not _is_said(fmt, rest, example))
    return PassedOver(tuple(rest), (*_meant(rest), *_unsaid(rest, example), *in_messages), others)


def of_tokens(row: Row, used: Collection[str], known: Mapping[str, Format]) -> PassedOver:
    """The same of a row that comes as token ids, of which `used` are the columns."""
    rest = {name: value for name, value in row.items() if name not in used and not _is_empty(value)}
    return PassedOver(tuple(rest), _meant(rest), tuple(name for name, fmt in known.items() if fmt.matches(rest)))


def way_out(name: str) -> str:
    """What to do about a column that looks meant."""
    if name == "completion_mask":
        return "completion_only_loss=True heeds it where there are no `labels`; a `loss_mask` is heeded always"
    if name == "assistant_masks":
        return "`labels` say already what is trained"
    if name.startswith("messages"):
        return "give them in a column `tools` of the row"
    target = MEANT.get(name.strip().lower())
    if target is not None:
        return f"--map {name}={target} (dataset.columns) has it read, where the format knows `{target}`"
    return "write it where the format looks for it (text has no system message and no tools), or leave it out"


def _meant(rest: Row) -> tuple[str, ...]:
    return tuple(name for name in rest if name.strip().lower() in MEANT)


def _unsaid(rest: Row, example: Example) -> tuple[str, ...]:
    """Columns of `SAID` whose text stands nowhere in the example."""
    left = {name: rest[name].strip() for name in SAID if isinstance(rest.get(name), str)}
    parts = (example.prompt or "", *example.completions) if left else ()
    texts = [
        text for part in parts for text in ([m.get("content") for m in part] if isinstance(part, list) else [part])
    ]
    return tuple(
        name for name, said in left.items() if not any(said in text for text in texts if isinstance(text, str))
    )


def _is_said(fmt: Format, rest: Row, example: Example) -> bool:
    """Whether `example` says all, in the same order, that `rest` says as a row of `fmt`: nothing is lost with it."""
    try:
        other = fmt.parse(rest, example.origin)
    except (DataError, *UNFORESEEN):
        return False
    said = _talks(example)
    return all(any(_is_part(talk, one) for one in said) for talk in _talks(other))


def _talks(example: Example) -> list[list[tuple[str, str]]]:
    """Of each answer, with its prompt, who says which words. White space is no word."""
    before = _turns(example.prompt or [], "user")
    return [[*before, *_turns(answer, "assistant")] for answer in example.completions]


def _turns(content: Content, role: str) -> list[tuple[str, str]]:
    messages = [{"role": role, "content": content}] if isinstance(content, str) else content
    return [(m["role"], "".join(str(m.get("content") or "").split())) for m in messages]


def _is_part(some: list[tuple[str, str]], all_of_them: list[tuple[str, str]]) -> bool:
    """Whether `some` are among the others in this order, or are all of them in one text."""
    rest = iter(all_of_them)
    return all(turn in rest for turn in some) or _words(some) == _words(all_of_them)


def _words(turns: list[tuple[str, str]]) -> str:
    return "".join(words for _, words in turns)


def _in_messages(example: Example) -> tuple[str, ...]:
    """Tools that stand in a message, where few templates look for them."""
    parts = (part for part in (example.prompt, *example.completions) if isinstance(part, list))
    found = {key for part in parts for message in part if len(message) > 2 for key in IN_A_MESSAGE if message.get(key)}
    return tuple(f"messages[].{key}" for key in sorted(found))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)
