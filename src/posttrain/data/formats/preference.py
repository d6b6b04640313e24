"""Preference pairs: columns `chosen` and `rejected`, text or messages, behind a prompt.

The prompt is in `prompt`, or in `conversations` (ShareGPT ranking) or `messages`, or is what `chosen` and `rejected`
begin with alike. A `prompt` of text beside lists of messages (as in UltraFeedback) must be said in that beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posttrain.data.codes import FILL, Row, bad_row, kind
from posttrain.data.conversation import check_answered, clean_messages, says_something
from posttrain.data.formats.build import build, filled_text
from posttrain.data.formats.renaming import QUESTION
from posttrain.data.formats.sharegpt import read_turns, wrap_tools
from posttrain.types import Content, Example, Message, Origin

SHAPE = "`chosen` and `rejected`, with or without `prompt`"
PAIR = ("chosen", "rejected")
CONTEXTS = ("conversations", "messages", "conversation")
COLUMNS = {"prompt", *PAIR}


def matches(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def check_whole(row: Row, origin: Origin) -> None:
    """Raises DataError (E-DATA-0033) for half a pair: without this it would be trained as something else, or not at
    all, by the columns beside it. A number or a boolean there (the index of a choice) is a column of the user's own."""
    for column, other in (PAIR, PAIR[::-1]):
        if row.get(other) is None and isinstance(row.get(column), str | list | Mapping) and row[column]:
            what = f"is {'null' if other in row else 'missing'}, though there is `{column}`: half a pair"
            hint = f"give both, drop the row, or rename `{column}` (--map {column}=own_{column}) if it is no answer"
            raise bad_row("E-DATA-0033", origin, what, field=other, seen=row[column], row=row, hint=hint)


def question_beside(row: Row) -> str | None:
    """The column of a pair without a prompt that seems to hold its question, if neither answer holds these words."""
    if row.get("prompt") is not None or _context_column(row):
        return None
    column = next((name for name in QUESTION if isinstance(row.get(name), str) and row[name].strip()), None)
    return column if column and not any(_says(row[answer], row[column]) for answer in PAIR) else None


def _says(answer: Any, words: str) -> bool:
    messages = answer if isinstance(answer, list) else [answer]
    texts = [m.get("content", m.get("value")) if isinstance(m, Mapping) else m for m in messages]
    wanted = " ".join(words.split())
    return any(wanted in " ".join(text.split()) for text in texts if isinstance(text, str))


def describe(row: Row) -> str:
    context = _context_column(row) or ("prompt" if row.get("prompt") is not None else None)
    columns = ", ".join(f"`{name}`" for name in (context, *PAIR) if name)
    what = "text" if isinstance(row.get("chosen"), str) and not _context_column(row) else "messages"
    return f"read as preference pairs: columns {columns}, as {what}"


def parse(row: Row, origin: Origin) -> Example:
    if context := _context_column(row):
        return _ranking(row, origin, context)
    texts = {column: isinstance(row.get(column), str) for column in PAIR}
    if texts["chosen"] != texts["rejected"]:
        raise _mixed("chosen", "rejected", row, origin)
    if not texts["chosen"]:
        return _conversational(row, origin)
    if isinstance(row.get("prompt"), list):
        raise _mixed("prompt", "chosen", row, origin)
    chosen, rejected = (filled_text(row, column, origin, "E-DATA-0013") for column in PAIR)
    if row.get("prompt") is None:
        shared = _shared_text(chosen, rejected)
        return _pair(row, origin, chosen[:shared] or None, chosen[shared:], rejected[shared:], COLUMNS)
    prompt = "" if row["prompt"] == "" else filled_text(row, "prompt", origin, "E-DATA-0014")
    return _pair(row, origin, prompt, chosen, rejected, COLUMNS)


def _ranking(row: Row, origin: Origin, context: str) -> Example:
    """A conversation, and two messages (or texts) that may follow it."""
    is_sharegpt = any(isinstance(turn, Mapping) and "from" in turn for turn in row[context])
    read = read_turns if is_sharegpt else clean_messages
    turns = read(row[context], context, row, origin)
    chosen, rejected = (_answer(row, column, is_sharegpt, origin) for column in PAIR)
    return wrap_tools(_pair(row, origin, turns, chosen, rejected, {context, *PAIR}))


def _answer(row: Row, column: str, is_sharegpt: bool, origin: Origin) -> list[Message]:
    value = row[column]
    if isinstance(value, str):
        return [{"role": "assistant", "content": filled_text(row, column, origin, "E-DATA-0013")}]
    messages = value if isinstance(value, list) else [value]
    in_turns = is_sharegpt and any(isinstance(message, Mapping) and "from" in message for message in messages)
    read = read_turns if in_turns else clean_messages
    return _filled(read(messages, column, row, origin), column, row, origin)


def _conversational(row: Row, origin: Origin) -> Example:
    chosen, rejected = (
        _filled(clean_messages(_as_list(row[column]), column, row, origin), column, row, origin) for column in PAIR
    )
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _pair(row, origin, clean_messages(prompt, "prompt", row, origin), chosen, rejected, COLUMNS)
    shared = _shared(chosen, rejected)
    context = chosen[:shared]
    if isinstance(prompt, str) and prompt.strip() and context:
        if not any(prompt.strip() in str(message.get("content")) for message in context):
            what = "is not what `chosen` and `rejected` begin with"
            hint = "write it as a list of messages, or leave it out"
            raise bad_row("E-DATA-0016", origin, what, field="prompt", seen=prompt, row=row, hint=hint)
    elif isinstance(prompt, str) and prompt.strip():
        context = [{"role": "user", "content": prompt}]
    if not context:
        hint = "put the conversation before them into `prompt`"
        raise bad_row("E-DATA-0016", origin, "begins otherwise than `rejected`, and there is no prompt",
                      field="chosen", row=row, hint=hint)  # fmt: skip
    return _pair(row, origin, context, chosen[shared:], rejected[shared:], COLUMNS)


def _pair(
    row: Row, origin: Origin, prompt: Content | None, chosen: Content, rejected: Content, used: set[str]
) -> Example:
    for column, answer in zip(PAIR, (chosen, rejected), strict=True):
        if isinstance(answer, list):
            check_answered(answer, column, row, origin)
    return replace(build(row, origin, prompt, chosen, used), completions=(chosen, rejected))


def _filled(messages: list[Message], column: str, row: Row, origin: Origin) -> list[Message]:
    if not says_something(messages[-1]):
        raise bad_row("E-DATA-0013", origin, "is empty", field=column, row=row, hint=FILL)
    return messages


def _context_column(row: Row) -> str | None:
    """The column with what was said before; one that holds an answer itself, as UltraFeedback's `messages`, is none."""
    answers = [row.get(column) for column in PAIR]
    return next((name for name in CONTEXTS if isinstance(row.get(name), list) and row[name] not in answers), None)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both begin with; each keeps its last."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), most)


def _shared_text(chosen: str, rejected: str) -> int:
    """Where two texts part, as TRL finds it; a space before that place belongs to the answers."""
    most = min(len(chosen), len(rejected))
    parted = next((i for i in range(most) if chosen[i] != rejected[i]), most - 1)
    return parted - 1 if parted > 0 and chosen[parted - 1] == " " else max(parted, 0)


def _mixed(one: str, other: str, row: Row, origin: Origin) -> Exception:
    what = f"is {kind(row[one])} but `{other}` is {kind(row[other])}"
    hint = "write all of them as text, or all as messages"
    return bad_row("E-DATA-0016", origin, what, field=one, seen=row[one], row=row, hint=hint)
