"""From prompts to rollouts: through an engine, or through a `rollout_func` of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.data.prompts import Prompt
from posttrain.errors import ConfigError
from posttrain.rollout.engines import Completion, Engine, Request
from posttrain.rollout.generation import Rollout
from posttrain.rollout.sampling import Sampling

FIELDS = ("prompt_ids", "completion_ids", "logprobs")


@dataclass
class EngineSampler:
    """Random numbers follow from the seed and `key`, which differs from call to call."""

    engine: Engine
    prompts: Sequence[Prompt]
    sampling: Sampling

    def __call__(self, places: Sequence[int], count: int, key: int, stopped: Callable[[], bool]) -> list[Rollout]:
        self.engine.update_weights()
        requests = [Request(self.prompts[place].ids.tolist(), key + group, count) for group, place in enumerate(places)]
        made = self.engine.generate(requests, self.sampling, stopped)
        return [
            _rollout(place, group, self.prompts[place].ids, completion)
            for group, (place, completions) in enumerate(zip(places, made, strict=True))
            for completion in completions
        ]

    def with_sampling(self, **changes: Any) -> EngineSampler:
        return replace(self, sampling=replace(self.sampling, **changes))


def _rollout(place: int, group: int, prompt_ids: np.ndarray, said: Completion) -> Rollout:
    extra = {} if said.text is None else {"text": said.text}
    supervised = np.ones(len(said.ids), dtype=bool)
    return Rollout(place, group, prompt_ids, said.ids, supervised, said.is_ended, sampled_logp_R=said.logps,
                   extra=extra)  # fmt: skip


@dataclass
class FunctionSampler:
    """`function(prompts, trainer)` gives `prompt_ids`, `completion_ids` and `logprobs`, a list each, as in TRL;
    `env_mask` says which tokens the model wrote, and every other list goes to the rewards. It is called once with the
    prompt of each completion. `end_ids` tell what has ended."""

    function: Callable[..., Mapping[str, Any]]
    trainer: Any
    prompts: Sequence[Prompt]
    end_ids: frozenset[int]

    def __call__(self, places: Sequence[int], count: int, key: int, stopped: Callable[[], bool]) -> list[Rollout]:
        wanted = [(place, group) for group, place in enumerate(places) for _ in range(count)]
        given = self.function([self.prompts[place].content for place, _ in wanted], self.trainer)
        if inspect.isawaitable(given) or not isinstance(given, Mapping):
            raise ConfigError(f"rollout_func gave {type(given).__name__}, not a dict of lists")
        if missing := [name for name in FIELDS if name not in given]:
            raise ConfigError(f"rollout_func gave no {', '.join(missing)}", hint=f"it must give {', '.join(FIELDS)}")
        extra = {name: value for name, value in given.items() if name not in (*FIELDS, "env_mask")}
        for name, values in {**extra, **{name: given[name] for name in (*FIELDS, "env_mask") if name in given}}.items():
            if isinstance(values, list) and len(values) != len(wanted):
                raise ConfigError(f"rollout_func gave {len(values)} of {name} for {len(wanted)} completions")
        return [
            self._rollout(place, group, i, given, {name: _of(value, i) for name, value in extra.items()})
            for i, (place, group) in enumerate(wanted)
        ]

    def _rollout(self, place: int, group: int, i: int, given: Mapping[str, Any], extra: dict[str, Any]) -> Rollout:
        ids = np.array(given["completion_ids"][i], dtype=np.int64)
        if not len(ids):
            raise ConfigError(f"rollout_func gave an empty completion for {self.prompts[place].origin}")
        supervised = np.ones(len(ids), dtype=bool)
        if given.get("env_mask") is not None:
            supervised = np.array(given["env_mask"][i], dtype=bool)
        for name, values in (("env_mask", supervised), ("logprobs", _row(given["logprobs"], i))):
            if values is not None and len(values) != len(ids):
                raise ConfigError(f"rollout_func gave {len(values)} of {name} for a completion of {len(ids)} tokens")
        logps = _row(given["logprobs"], i)
        sampled = None if logps is None else np.array(logps, dtype=np.float32)[supervised]
        prompt_ids = np.array(given["prompt_ids"][i], dtype=np.int64)
        return Rollout(place, group, prompt_ids, ids, supervised, int(ids[-1]) in self.end_ids, sampled_logp_R=sampled,
                       extra=extra)  # fmt: skip


def _row(values: Any, i: int) -> Any:
    return None if values is None else values[i]


def _of(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, list) else value
