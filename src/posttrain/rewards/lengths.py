"""Penalties for length, in tokens. They are added to a reward that says what is right: alone they teach silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.functions import RewardFunction


def soft_overlong(max_length: int, buffer: int) -> RewardFunction:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to `max_length - buffer` tokens, from there
    falling in a line to -1 at `max_length`, and -1 beyond."""
    if not 0 < buffer <= max_length:
        raise ConfigError(f"soft_overlong({max_length}, {buffer}): the buffer must be above 0 and at most the length")

    def soft_overlong(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [max(-1.0, min(0.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return soft_overlong


def length_penalty(per_token: float = 0.001, free: int = 0, least: float = -1.0) -> RewardFunction:
    """`-per_token` for every token beyond the first `free`, but not below `least`."""
    if not (per_token > 0 and free >= 0 and least < 0):
        raise ConfigError(f"length_penalty(per_token={per_token}, free={free}, least={least}): a penalty needs "
                          "per_token above 0, free of at least 0, least below 0")  # fmt: skip

    def length_penalty(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [max(least, -per_token * max(0, len(ids) - free)) for ids in completion_ids]

    return length_penalty
