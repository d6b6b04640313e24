"""Conversations written into one text (`Human: ... Assistant: ...`), as Anthropic's hh-rlhf and guanaco have them.

They are read as the text that they are, as in TRL: no chat template writes them, and what the human says is trained
where it stands in what is trained. Both are worth knowing.
"""

from __future__ import annotations

import re

from posttrain.types import Example

LABEL = r"(?:^[ \t]*\**|#{2,4}[ \t]*)(?:%s)\**:"
OTHERS = re.compile(LABEL % "Human|HUMAN|User|USER|Prompter", re.MULTILINE)
ASSISTANT = re.compile(LABEL % "Assistant|ASSISTANT|Bot|GPT|AI|Chatbot", re.MULTILINE)


def is_transcript(example: Example) -> bool:
    """Whether the text of an example is a conversation."""
    if example.is_conversational:
        return False
    text = f"{example.prompt or ''}{example.completions[0]}"
    return OTHERS.search(text) is not None and ASSISTANT.search(text) is not None


def has_others_trained(example: Example) -> bool:
    """Whether of a transcript what others say is in what is trained."""
    return any(OTHERS.search(str(answer)) is not None for answer in example.completions)
