"""From prompts to rollouts: through an engine, or through a `rollout_func` of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.data.prompts import Prompt
from posttrain.errors import ConfigError, UserError
from posttrain.rewards.deadline import Overdue, deadline
from posttrain.rollout.engines import Completion, Engine, Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.fitting import generate_fitting
from posttrain.rollout.generation import Rollout
from posttrain.rollout.sampling import Sampling


class RolloutError(UserError):
    """A `rollout_func` that failed."""

    code = "E-ENGINE-0003"


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
        if isinstance(self.engine, LocalEngine):
            made = generate_fitting(self.engine, requests, self.sampling, stopped)
        else:
            made = self.engine.generate(requests, self.sampling, stopped)
        return [
            _rollout(place, group, self.prompts[place].ids, completion)
            for group, (place, completions) in enumerate(zip(places, made, strict=True))
            for completion in completions
        ]

    def with_sampling(self, **changes: Any) -> EngineSampler:
        return replace(self, sampling=replace(self.sampling, **changes))


def _rollout(place: int, group: int, prompt_ids: np.ndarray, said: Completion) -> Rollout:
    supervised = np.ones(len(said.ids), dtype=bool)
    return Rollout(place, group, prompt_ids, said.ids, supervised, said.is_ended, sampled_logp_R=said.logps,
                   text=said.text)  # fmt: skip


@dataclass
class FunctionSampler:
    """`function(prompts, trainer)` gives `prompt_ids`, `completion_ids` and `logprobs`, a list each, as in TRL;
    `env_mask` says which tokens the model wrote, and every other list goes to the rewards. It is called once with the
    prompt of each completion. `end_ids` tell what has ended; `vocabulary` is how many tokens the model knows, `places`
    for how many in a row it has learned positions, `deadline` how many seconds a call may take."""

    function: Callable[..., Mapping[str, Any]]
    trainer: Any
    prompts: Sequence[Prompt]
    end_ids: frozenset[int]
    vocabulary: int
    places: int | None = None
    deadline: float = 3600.0

    def __call__(self, places: Sequence[int], count: int, key: int, stopped: Callable[[], bool]) -> list[Rollout]:
        wanted = [(place, group) for group, place in enumerate(places) for _ in range(count)]
        given = self._called([self.prompts[place].content for place, _ in wanted])
        if inspect.isawaitable(given) or not isinstance(given, Mapping):
            raise ConfigError(f"rollout_func gave {type(given).__name__}, not a dict of lists")
        if missing := [name for name in FIELDS if name not in given]:
            raise ConfigError(f"rollout_func gave no {', '.join(missing)}", hint=f"it must give {', '.join(FIELDS)}")
        if odd := [name for name in given if not isinstance(name, str)]:
            raise ConfigError(f"rollout_func gave the key {odd[0]!r}, which is no text",
                              hint="what it gives beside is handed to the rewards by name")  # fmt: skip
        extra = {name: value for name, value in given.items() if name not in (*FIELDS, "env_mask")}
        for name, values in {**extra, **{name: given[name] for name in (*FIELDS, "env_mask") if name in given}}.items():
            has_length = isinstance(values, list) or (name in FIELDS and hasattr(values, "__len__"))
            if has_length and len(values) != len(wanted):
                raise ConfigError(f"rollout_func gave {len(values)} of {name} for {len(wanted)} completions")
        return [
            self._rollout(place, group, i, given, {name: _of(value, i) for name, value in extra.items()})
            for i, (place, group) in enumerate(wanted)
        ]

    def _called(self, prompts: list[Any]) -> Mapping[str, Any]:
        try:
            with deadline(self.deadline):
                return self.function(prompts, self.trainer)
        except Overdue:
            hint = "give what it waits for a limit of its own, or raise rollout_timeout"
            raise RolloutError(f"rollout_func has not answered within {self.deadline:g} s", hint=hint) from None
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit too, which would end the run without a word
            raise RolloutError(f"rollout_func failed: {type(error).__name__}: {error}",
                               hint="it is called as rollout_func(prompts, trainer)") from error  # fmt: skip

    def _ids(self, name: str, given: Mapping[str, Any], i: int, place: int) -> np.ndarray:
        """Token ids that the model knows, at least one."""
        numbers = _array(name, _row(name, given[name], i), np.float64)
        ids = numbers.astype(np.int64)
        if not np.array_equal(ids, numbers):
            raise ConfigError(f"rollout_func gave {name} that are no whole numbers: {numbers[ids != numbers][0]}")
        if not len(ids):
            raise ConfigError(f"rollout_func gave empty {name} for {self.prompts[place].origin}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            wrong = ids[(ids < 0) | (ids >= self.vocabulary)][0]
            raise ConfigError(f"rollout_func gave token {wrong} in {name} for {self.prompts[place].origin}; the model "
                              f"knows 0 to {self.vocabulary - 1}")  # fmt: skip
        return ids

    def _rollout(self, place: int, group: int, i: int, given: Mapping[str, Any], extra: dict[str, Any]) -> Rollout:
        ids = self._ids("completion_ids", given, i, place)
        supervised = np.ones(len(ids), dtype=bool)
        if given.get("env_mask") is not None:
            supervised = np.nan_to_num(_array("env_mask", _row("env_mask", given["env_mask"], i), np.float64)) != 0
        logps = None if given["logprobs"] is None else _row("logprobs", given["logprobs"], i)
        logp_R = None if logps is None else _array("logprobs", logps, np.float32)
        for name, values in (("env_mask", supervised), ("logprobs", logp_R)):
            if values is not None and len(values) != len(ids):
                raise ConfigError(f"rollout_func gave {len(values)} of {name} for a completion of {len(ids)} tokens")
        sampled = None if logp_R is None else logp_R[supervised]
        prompt_ids = self._ids("prompt_ids", given, i, place)
        if self.places is not None and len(prompt_ids) + len(ids) > self.places:
            raise ConfigError(f"rollout_func gave {len(prompt_ids)} prompt_ids and {len(ids)} completion_ids for "
                              f"{self.prompts[place].origin}; the model has {self.places} places for them together",
                              hint="end completions earlier")  # fmt: skip
        return Rollout(place, group, prompt_ids, ids, supervised, int(ids[-1]) in self.end_ids, sampled_logp_R=sampled,
                       extra=extra)  # fmt: skip


def _array(name: str, values: Any, kind: type) -> np.ndarray:
    """One number a token; None is NaN, as vLLM says what it does not know."""
    try:
        array: np.ndarray = np.array([np.nan if value is None else value for value in values], dtype=kind)
    except (TypeError, ValueError, OverflowError):
        array = np.zeros((0, 0))
    if array.ndim != 1:
        raise ConfigError(f"rollout_func gave {name} that are no list of numbers, one a token: {str(values)[:60]}")
    return array


def _row(name: str, values: Any, i: int) -> Any:
    """Raises ConfigError for what has no such row."""
    try:
        return values[i]
    except (TypeError, IndexError, KeyError):
        raise ConfigError(f"rollout_func gave {name} as {type(values).__name__} without a row {i}",
                          hint="give a list with one entry for each completion") from None  # fmt: skip


def _of(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, list) else value
