"""Format: a completion matches a pattern, or is made of tags in their order, `<think>...</think><answer>...</answer>`.

Such a reward says nothing of what is right; it stands beside one that does, with a smaller weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.functions import RewardFunction, text_of
from posttrain.types import Content


def matches(pattern: str, whole: bool = True, name: str = "matches") -> RewardFunction:
    """1.0 where the text matches `pattern` (a dot takes line ends too), else 0.0; with `whole=False` anywhere in it."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"matches({pattern!r}) is no regular expression: {error}") from None
    find = compiled.fullmatch if whole else compiled.search

    def reward(completions: Sequence[Content], **_: Any) -> list[float]:
        return [float(find(text_of(content)) is not None) for content in completions]

    reward.__name__ = reward.__qualname__ = name
    return reward


def tagged(*tags: str, name: str = "tagged") -> RewardFunction:
    """1.0 where the text is these tags one after another, each once and with something in it, and nothing but blanks
    around them; else 0.0."""
    if not tags or not all(re.fullmatch(r"[A-Za-z][\w-]*", tag) for tag in tags):
        raise ConfigError(f"tagged{tags!r}: give the names of tags", hint='tagged("think", "answer")')

    def reward(completions: Sequence[Content], **_: Any) -> list[float]:
        return [float(_is_tagged(text_of(content), tags)) for content in completions]

    reward.__name__ = reward.__qualname__ = name
    return reward


def _is_tagged(text: str, tags: Sequence[str]) -> bool:
    """By searching, without a pattern that could take long on hostile text."""
    rest = text.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1 or not rest.startswith(opening):
            return False
        inside, found, rest = rest[len(opening) :].partition(closing)
        if not found or not inside.strip() or any(f"<{other}>" in inside for other in tags):
            return False
        rest = rest.lstrip()
    return not rest


think_answer = tagged("think", "answer", name="think_answer")
