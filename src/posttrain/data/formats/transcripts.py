"""Conversations written into one text (`Human: ... Assistant: ...`), as Anthropic's hh-rlhf and guanaco have them.

They are read as the text that they are, as in TRL: no chat template writes them, and what the human says is trained
where it stands in what is trained. Both are worth knowing. A text is one where it begins with a label, or a prompt that
stands before it holds one: an answer alone may be a dialogue that was asked for.
"""

from __future__ import annotations

import re

from posttrain.types import Content, Example

LABEL = r"(?:^[ \t]*\**|#{2,4}[ \t]*)(?:%s)\**:"
OTHERS = re.compile(LABEL % "Human|HUMAN|User|USER|Prompter", re.MULTILINE)
ASSISTANT = re.compile(LABEL % "Assistant|ASSISTANT|Bot|GPT|AI|Chatbot", re.MULTILINE)


def is_transcript(example: Example) -> bool:
    """Whether the text of an example, or what a user says in it, is a conversation."""
    if example.is_conversational:
        return any(_has_transcript(part) for part in (example.prompt, *example.completions))
    prompt, answer = str(example.prompt or ""), str(example.completions[0])
    return _is_talk(prompt + answer) and (not prompt or OTHERS.search(prompt) is not None)


def has_others_trained(example: Example) -> bool:
    """Whether of a transcript what others say is in what is trained."""
    if example.is_conversational or not (example.prompt or begins_as_one(str(example.completions[0]))):
        return False
    return any(OTHERS.search(str(answer)) is not None for answer in example.completions)


def begins_as_one(text: str) -> bool:
    """Whether a text begins with one of the labels, and so is nothing but a transcript."""
    said = text.lstrip()
    return OTHERS.match(said) is not None or ASSISTANT.match(said) is not None


def _is_talk(text: str) -> bool:
    return OTHERS.search(text) is not None and ASSISTANT.search(text) is not None


def _has_transcript(part: Content | None) -> bool:
    users = (m.get("content") for m in part if m["role"] == "user") if isinstance(part, list) else ()
    return any(isinstance(said, str) and begins_as_one(said) and _is_talk(said) for said in users)
