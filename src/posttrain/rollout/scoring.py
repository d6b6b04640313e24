"""What a round's completions say, what the rewards make of it, and the numbers that people follow."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.prompts import Prompt
from posttrain.objectives.base import GIVEN
from posttrain.rewards.functions import Completions, Rewards, weighted_sum
from posttrain.rollout.advantages import Advantages, OfRound
from posttrain.rollout.generation import Rollout
from posttrain.types import Content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("posttrain")
RESERVED = ("completion", "completion_ids")
"""Columns of the data that rewards do not get: their own arguments are called so."""


@dataclass(frozen=True)
class Verdict:
    """`rewards_NF` in float64, NaN where function `names[f]` says nothing; `contents` is what was judged; `extra` and
    `noted` are what the functions logged themselves, columns and metrics."""

    names: tuple[str, ...]
    contents: list[Content]
    rewards_NF: np.ndarray
    extra: dict[str, list[Any]]
    noted: dict[str, list[float]]

    @property
    def num_rollouts(self) -> int:
        return len(self.contents)

    def part(self, chosen: Sequence[int]) -> Verdict:
        """Of some completions. What functions noted of all of them stays."""
        extra = {
            name: [values[i] for i in chosen] if len(values) == self.num_rollouts else values
            for name, values in self.extra.items()
        }
        return Verdict(self.names, [self.contents[i] for i in chosen], self.rewards_NF[list(chosen)], extra, self.noted)

    def and_(self, other: Verdict) -> Verdict:
        """Of these completions and then those."""
        extra = {name: self.extra.get(name, []) + other.extra.get(name, []) for name in {**self.extra, **other.extra}}
        noted = {name: self.noted.get(name, []) + other.noted.get(name, []) for name in {**self.noted, **other.noted}}
        rewards_NF = np.concatenate([self.rewards_NF, other.rewards_NF])
        return Verdict(self.names, self.contents + other.contents, rewards_NF, extra, noted)

    def metrics(self, worth: Advantages) -> dict[str, tuple[float, int]]:
        """TRL's, by name: sums and counts."""
        made: dict[str, tuple[float, int]] = {}
        for name, value_N in zip(self.names, self.rewards_NF.T, strict=True):
            said_N = value_N[~np.isnan(value_N)]
            if len(said_N):
                made[f"rewards/{name}/mean"] = (float(said_N.sum()), len(said_N))
                made[f"rewards/{name}/std"] = OfRound(_deviation(said_N))
        total_N = worth.reward_N[~np.isnan(worth.reward_N)]
        if len(total_N):
            made["reward"] = (float(total_N.sum()), len(total_N))
            made["reward_std"] = OfRound(_deviation(total_N))
        if worth.without_signal is not None:
            made["frac_reward_zero_std"] = OfRound(worth.without_signal)
        noted = {GIVEN + name: (float(sum(values)), len(values)) for name, values in self.noted.items()}
        return made | worth.metrics | noted


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


@dataclass
class Judge:
    """`prompts` are those of the data; `state` is what rewards get as `trainer_state`; where nothing `learns` from what
    they say, it does not matter that they say nothing."""

    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    rewards: Rewards
    state: Callable[[], Any] = lambda: None
    learns: bool = True
    _extra: dict[str, list[Any]] = field(default_factory=dict)
    _noted: dict[str, list[float]] = field(default_factory=dict)
    _infinite: set[str] = field(default_factory=set)
    _is_silent: bool = False

    def __call__(self, rollouts: Sequence[Rollout]) -> Verdict:
        """Raises RewardError."""
        self._extra, self._noted = {}, {}
        own = {"trainer_state": self.state(), "log_extra": self._log_extra, "log_metric": self._log_metric}
        self.rewards.extra = own
        contents = self.contents(rollouts)
        asked = Completions(
            [self.prompts[one.prompt].content for one in rollouts],
            contents,
            [one.ids.tolist() for one in rollouts],
            self._columns(rollouts),
        )
        rewards_NF = self.rewards(asked)
        total_N = weighted_sum(rewards_NF, np.array(self.rewards.weights))
        if self.learns and len(rollouts) and not self._is_silent and np.isnan(total_N).all():
            self._is_silent = True
            logger.warning("reward   no function says anything of any of %d completions: nothing is learned from them",
                           len(rollouts))  # fmt: skip
        return Verdict(tuple(self.rewards.functions), contents, rewards_NF, self._extra, self._noted)

    def contents(self, rollouts: Sequence[Rollout]) -> list[Content]:
        """The text of each completion without special tokens; a message where its prompt is messages."""
        texts = self.tokenizer.batch_decode([one.ids for one in rollouts], skip_special_tokens=True)
        said = [text if one.text is None else one.text for one, text in zip(rollouts, texts, strict=True)]
        return [
            [{"role": "assistant", "content": text}] if self.prompts[one.prompt].is_conversational else text
            for one, text in zip(rollouts, said, strict=True)
        ]

    def _columns(self, rollouts: Sequence[Rollout]) -> Mapping[str, list[Any]]:
        """Of every column that any row has, a value for each completion."""
        rows = [{**self.prompts[one.prompt].columns, **one.extra} for one in rollouts]
        names = dict.fromkeys(name for row in rows for name in row if name not in RESERVED)
        return {name: [row.get(name) for row in rows] for name in names}

    def _log_extra(self, column: str, values: list[Any]) -> None:
        _check_name("log_extra", column)
        self._extra.setdefault(column, []).extend(values)

    def _log_metric(self, name: str, value: float) -> None:
        """What is not finite is left out, and an infinity named once: no checkpoint could hold it."""
        _check_name("log_metric", name)
        number = float(value)
        if math.isfinite(number):
            self._noted.setdefault(name, []).append(number)
        elif math.isinf(number) and name not in self._infinite:
            self._infinite.add(name)
            logger.warning("log_metric(%r, %s): an infinite value is not logged", name, number)


def _check_name(function: str, name: Any) -> None:
    """What a reward function raises is told as its own."""
    if not isinstance(name, str):
        raise TypeError(f"{function}({name!r}, ...): a name must be text")
