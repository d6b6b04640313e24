"""What a row holds that its format has no place for. Most of it is the user's own (an id, a source) and of no account;
what looks meant is named: columns that other formats know, and whole formats beside the one that was read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.codes import UNFORESEEN, Row
from posttrain.data.flags import is_like_a_flag
from posttrain.data.folders import SPLITS
from posttrain.data.formats import Format
from posttrain.errors import DataError
from posttrain.types import Content, Example, Message

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
SAID = ("prompt", "completion", "instruction", "input", "output", "question", "answer", "response",
        "query", "problem", "solution", "user", "assistant")  # fmt: skip
"""Columns that other rows are made of. Often they say once more what a conversation says; else they look meant."""
IN_A_MESSAGE = ("tools", "functions", "documents", "context", "refusal", "image", "images", "audio", "video", "videos",
                "file", "files", "attachments")  # fmt: skip
WORDS_OF_A_MESSAGE = ("text", "value", "contents", "message")
"""Keys under which others write what a message says: they look meant where `content` says something else."""
TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns that rate both answers of a pair."""
MARGIN = "margin"
SPLIT = ("split", "subset", "partition")
"""Columns that say which part of the data a row is of."""
OF_TOKENS = re.compile(r"(?!special_tokens_mask).*(mask|masks|weights)")
"""Columns of a row of tokens that seem to say which of them are trained."""
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
    margin = (MARGIN,) if MARGIN in rest and len(example.completions) == 2 else ()
    if is_named:
        return PassedOver(tuple(rest), (*_meant(rest), *margin, *in_messages))
    matching = [(name, fmt) for name, fmt in known.items() if fmt.matches(rest)]
    others = tuple(name for name, fmt in matching if not _is_said(fmt, rest, example))
    turns = () if matching else tuple(name for name in TURNS if isinstance(rest.get(name), list))
    return PassedOver(tuple(rest), (*_meant(rest), *margin, *_unsaid(rest, example), *turns, *in_messages), others)


def of_tokens(row: Row, used: Collection[str], known: Mapping[str, Format]) -> PassedOver:
    """The same of a row that comes as token ids, of which `used` are the columns."""
    rest = {name: value for name, value in row.items() if name not in used and not _is_empty(value)}
    masks = tuple(name for name in rest if name not in MEANT and OF_TOKENS.fullmatch(name.lower()))
    return PassedOver(
        tuple(rest), (*_meant(rest), *masks), tuple(name for name, fmt in known.items() if fmt.matches(rest))
    )


def way_out(name: str) -> str:
    """What to do about a column that looks meant."""
    if name.partition(":")[0] in SPLIT and ":" in name:
        return "take these rows out, and validate on them; rename the column if it says something else"
    if name == MARGIN:
        return "reward models alone learn from margins; leave it out for other methods"
    if " below " in name:
        return "swap or drop such pairs, if the scores are right"
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
    held_out = (f"{name}: {rest[name].strip()}" for name in SPLIT if _is_held_out(rest.get(name)))
    named = (name for name in rest if name.strip().lower() in MEANT or is_like_a_flag(name, rest[name]))
    worse = (
        f"{chosen} below {rejected}" for chosen, rejected in SCORES if _is_below(rest.get(chosen), rest.get(rejected))
    )
    return (*named, *held_out, *worse)


def _is_below(chosen: Any, rejected: Any) -> bool:
    return isinstance(chosen, int | float) and isinstance(rejected, int | float) and chosen < rejected


def _is_held_out(split: Any) -> bool:
    return isinstance(split, str) and SPLITS.get(split.strip().lower(), "train") != "train"


def _unsaid(rest: Row, example: Example) -> tuple[str, ...]:
    """Columns of `SAID` whose text stands nowhere in the example."""
    left = {name: said.strip() for name, said in rest.items() if isinstance(said, str) and name.strip().lower() in SAID}
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
    """Tools, pictures or other words that stand in a message, where few templates look for them."""
    parts = (part for part in (example.prompt, *example.completions) if isinstance(part, list))
    messages = [message for part in parts for message in part if len(message) > 2]
    found = {key for message in messages for key in IN_A_MESSAGE if message.get(key)}
    found |= {key for message in messages for key in WORDS_OF_A_MESSAGE if _says_else(message, key)}
    return tuple(f"messages[].{key}" for key in sorted(found))


def _says_else(message: Message, key: str) -> bool:
    said = message.get(key)
    return isinstance(said, str) and bool(said.strip()) and said.strip() not in (message.get("content") or "")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)
