"""What is read and trained as it is written, and was perhaps not meant so: counted by name in training's report and by
the doctor, for whom no model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.data.codes import Row
from posttrain.data.columns import json_left_as_text, read_from_json
from posttrain.data.conversation import SYSTEM, says_something
from posttrain.data.formats.transcripts import has_others_trained, is_transcript
from posttrain.types import Content, Example, Message

CODES = {
    "from_json": "W-DATA-0152",
    "json_as_text": "W-DATA-0153",
    "others_trained": "W-DATA-0155",
    "transcripts": "W-DATA-0156",
    "prompt_repeated": "W-DATA-0157",
    "silent_turns": "W-DATA-0158",
    "other_questions": "W-DATA-0161",
}
ASKING = (*SYSTEM, "user")
MIN_REPEATED = 20
"""Characters of a prompt from which on it is no chance that an answer begins with them."""


def oddities(example: Example, given: Row, read: Row) -> Iterator[str]:
    """Their names; `read` is what was made of the columns of `given`."""
    if read_from_json(given, read):
        yield "from_json"
    if json_left_as_text(read):
        yield "json_as_text"
    if is_transcript(example):
        yield "others_trained" if has_others_trained(example) else "transcripts"
    if example.prompt and any(_repeats(example.prompt, answer) for answer in example.completions):
        yield "prompt_repeated"
    if any(_is_silent(message) for part in (example.prompt, *example.completions) for message in _turns(part)):
        yield "silent_turns"
    if len(example.completions) > 1 and any(_asks_on(example.prompt, answer) for answer in example.completions):
        yield "other_questions"


def _repeats(prompt: Content, answer: Content) -> bool:
    """Whether an answer begins with its whole prompt, which then stands twice before what is answered."""
    if isinstance(prompt, str) and isinstance(answer, str):
        said = prompt.strip()
        return len(said) >= MIN_REPEATED and answer.lstrip().startswith(said)
    asked, answered = ([(m["role"], m.get("content")) for m in _turns(part) if m["role"] not in SYSTEM]
                       for part in (prompt, answer))  # fmt: skip
    return bool(asked) and answered[: len(asked)] == asked


def _asks_on(prompt: Content | None, answer: Content) -> bool:
    """Whether one of two answers that are compared begins with others' words: the two answer other questions."""
    turns = _turns(answer)
    return bool(turns) and turns[0]["role"] in ASKING and not (prompt and _repeats(prompt, answer))


def _is_silent(message: Message) -> bool:
    return message["role"] in ASKING and not says_something(message)


def _turns(part: Content | None) -> list[Message]:
    return part if isinstance(part, list) else []
