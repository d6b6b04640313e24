"""One round of sampling: the completions of some prompts, what they were worth, and what was said of them when they
were made. It serves several optimiser steps, and so is part of a checkpoint that falls between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.data.planning import OF_TOKENS
from posttrain.data.prompts import Prompt
from posttrain.types import Branch, Tokenized


@dataclass
class Rollout:
    """A completion of prompt `prompt` (its place in the data), one of group `group` of its round.

    `supervised` says which of its tokens the policy wrote and is trained on (`L` of them are ids in all, `R` of these);
    `sampled_logp_R` is what the sampler said of those, `old_logp_R` the policy before the round's first step, where it
    is needed, `ref_logp_R` the reference; `extra` is what a `rollout_func` tells the rewards of it, `text` what
    stands before the stop string that ended it. Of methods with a
    value function, `old_value_R` is what that expected, `advantage_R` how much better each token was, and `return_R`
    what it is to learn."""

    prompt: int
    group: int
    prompt_ids: np.ndarray
    ids: np.ndarray
    supervised: np.ndarray
    is_ended: bool
    advantage: float = 0.0
    sampled_logp_R: np.ndarray | None = None
    old_logp_R: np.ndarray | None = None
    ref_logp_R: np.ndarray | None = None
    old_value_R: np.ndarray | None = None
    advantage_R: np.ndarray | None = None
    return_R: np.ndarray | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    text: str | None = None

    @property
    def num_rows(self) -> int:
        return int(self.supervised.sum())


@dataclass
class Generation:
    """Round `index`. `order` is how its rollouts are dealt out to batches; `tokens_sampled` counts prompts too, and
    what is masked later; `metrics` are sums and counts by name."""

    index: int
    rollouts: list[Rollout]
    order: list[int]
    tokens_sampled: int = 0
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(rollout.num_rows for rollout in self.rollouts)

    def slice(self, number: int, of: int) -> list[Rollout]:
        """Batch `number` of `of`, of equal size if nothing was left out."""
        count = len(self.order)
        return [self.rollouts[i] for i in self.order[number * count // of : (number + 1) * count // of]]

    def state(self) -> dict[str, Any]:
        """As plain values; numbers in fp32 come back bit for bit, NaN (what a sampler has not said) through None."""
        return {
            "index": self.index,
            "order": self.order,
            "tokens_sampled": self.tokens_sampled,
            "metrics": {name: list(pair) for name, pair in self.metrics.items()},
            "rollouts": [
                {
                    "prompt": one.prompt,
                    "group": one.group,
                    "prompt_ids": one.prompt_ids.tolist(),
                    "ids": one.ids.tolist(),
                    "supervised": one.supervised.astype(int).tolist(),
                    "is_ended": one.is_ended,
                    "advantage": one.advantage,
                    **{
                        name: None if (array := getattr(one, name)) is None else _plain(array)
                        for name in OF_TOKENS.values()
                    },
                }
                for one in self.rollouts
            ],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Generation:
        rollouts = [_rollout(one) for one in state["rollouts"]]
        metrics = {name: (total, count) for name, (total, count) in state["metrics"].items()}
        return cls(state["index"], rollouts, list(state["order"]), state["tokens_sampled"], metrics)


def _rollout(one: Mapping[str, Any]) -> Rollout:
    of_tokens: dict[str, Any] = {
        name: None if (values := one.get(name)) is None else _numbers(values) for name in OF_TOKENS.values()
    }
    return Rollout(
        prompt=one["prompt"],
        group=one["group"],
        prompt_ids=np.array(one["prompt_ids"], dtype=np.int64),
        ids=np.array(one["ids"], dtype=np.int64),
        supervised=np.array(one["supervised"], dtype=bool),
        is_ended=one["is_ended"],
        advantage=one["advantage"],
        **of_tokens,
    )


def _plain(array: np.ndarray) -> list[float | str | None]:
    """As JSON can say it, which has no word for what is no finite number."""
    return [one if math.isfinite(one) else None if math.isnan(one) else str(one) for one in array.tolist()]


def _numbers(values: Sequence[float | str | None]) -> np.ndarray:
    return np.array([math.nan if one is None else float(one) for one in values], dtype=np.float32)


def grouped(rollouts: Sequence[Rollout], budget: int) -> list[list[Rollout]]:
    """Those that go on from the same prompt, as many together as `budget` tokens hold."""
    groups: dict[tuple[int, bytes], list[Rollout]] = {}
    for one in rollouts:
        groups.setdefault((one.prompt, one.prompt_ids.tobytes()), []).append(one)
    return [part for members in groups.values() for part in _parts(members, budget)]


def _parts(members: list[Rollout], budget: int) -> list[list[Rollout]]:
    parts: list[list[Rollout]] = [[]]
    room = budget - len(members[0].prompt_ids)
    used = 0
    for one in members:
        if parts[-1] and used + len(one.ids) > room:
            parts.append([])
            used = 0
        parts[-1].append(one)
        used += len(one.ids)
    return parts


def together(members: list[Rollout], prompt: Prompt) -> Tokenized:
    """Rollouts of one prompt behind it."""
    columns: dict[str, Any] = {"advantage": [one.advantage for one in members]}
    for name, attribute in OF_TOKENS.items():
        values = [getattr(one, attribute) for one in members]
        if all(value is not None for value in values):
            columns[name] = values
    branches = tuple(Branch(one.ids, one.supervised) for one in members)
    return Tokenized(members[0].prompt_ids, branches, prompt.origin, columns)
