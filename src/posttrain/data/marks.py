"""What a chat template writes around turns, and texts that hold it themselves.

A text that holds such a token (`<|im_end|>`) is encoded as that token, as in TRL: in what the assistant says it is
trained, so that the model learns to stop there or to go on as another; in what others say it begins a turn that nobody
took. Marks that are no tokens (`[INST]`, `### Response:`) do the same in text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.flags import DETAIL
from posttrain.data.rendering import REASONING, RenderError
from posttrain.types import Example, Message, Origin

if TYPE_CHECKING:
    from posttrain.data.chat import Chat

TALK = [{"role": role, "content": f"qzmark{i}qz"} for i, role in enumerate(("user", "assistant", "user", "assistant"))]
MIN_LETTERS = 4
"""Shorter texts (`Q:`, `</`) are in too many others."""
THINK = re.compile(r"</?think(?:ing)?>")


@dataclass(frozen=True)
class Marks:
    """`tokens` matches those that begin or end turns, `texts` what is written there and is no token. None where there
    are none."""

    tokens: re.Pattern[str] | None
    texts: re.Pattern[str] | None


def marks_of(chat: Chat) -> Marks:
    """Found by showing the template a conversation of words that stand nowhere else."""
    tokens, texts = {str(token) for token in (chat.tokenizer.eos_token, chat.tokenizer.bos_token) if token}, set[str]()
    for between in map(_without_thoughts, _between(chat)):
        found = chat.special.findall(between) if chat.special else []
        tokens.update(found)
        plain = chat.special.split(between) if chat.special else [between]
        texts.update(line.strip() for part in plain for line in part.splitlines() if _is_mark(line.strip()))
    if getattr(chat.tokenizer, "split_special_tokens", False):  # then texts hold no tokens
        tokens, texts = set(), texts | tokens
    return Marks(_any(tokens), _any(texts, at_line_start=True))


def _without_thoughts(between: str) -> str:
    """An empty thought that a template writes is the assistant's own, and no mark of a turn."""
    return THINK.sub("", between)


def _between(chat: Chat) -> list[str]:
    """What stands behind each of the turns of `TALK` and before the next; nothing where the template refuses it."""
    try:
        full = chat.render(TALK, Example(None, (TALK,), Origin("", 0)))
    except (RenderError, TypeError, ValueError, LookupError):  # said of the conversations themselves
        return []
    return re.split("|".join(message["content"] for message in TALK), full)[1:]


def _is_mark(line: str) -> bool:
    """Not a bare `assistant`, which is a word, too."""
    return len(line) >= MIN_LETTERS and re.search(r"[^\w\s]", line) is not None


def _any(found: set[str], at_line_start: bool = False) -> re.Pattern[str] | None:
    """Matches any of them; `at_line_start` those that begin with a letter (`Assistant:`) only where a line begins."""
    patterns = [
        rf"^[ \t]*{re.escape(text)}" if at_line_start and text[0].isalnum() else re.escape(text)
        for text in sorted(found, key=len, reverse=True)
    ]
    return re.compile("|".join(patterns), re.MULTILINE) if patterns else None


def tokens_in_answers(talk: list[Message], marks: Marks) -> list[str]:
    """The tokens in what the assistant says and is trained to say, each once."""
    if marks.tokens is None:
        return []
    trained = (message for message in talk if message["role"] == "assistant" and _is_trained(message))
    return sorted({token for message in trained for text in _texts(message) for token in marks.tokens.findall(text)})


def holds_mark(talk: list[Message], marks: Marks) -> bool:
    """Whether anybody writes what the template writes around turns, as text."""
    return marks.texts is not None and any(marks.texts.search(text) for message in talk for text in _texts(message))


def stops_within(completion: str, eos: str | None) -> bool:
    """Whether a text holds the end-of-sequence token elsewhere than at its end."""
    return bool(eos) and str(eos) in completion.rstrip().removesuffix(str(eos))


def _is_trained(message: Message) -> bool:
    return message.get("train") is not False or any(train for *_, train in message.get(DETAIL, ()))


def _texts(message: Message) -> Iterator[str]:
    yield from (message[key] for key in ("content", *REASONING) if isinstance(message.get(key), str))
    if calls := message.get("tool_calls"):
        yield json.dumps(calls, ensure_ascii=False, default=str)
