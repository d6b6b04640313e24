"""Asking reward functions, and telling whatever they do wrong by name: never a silent zero.

A function that raises, takes too long, gives the wrong number of rewards, or something that is no finite number ends
the step with a `RewardError` that says which function, and where there is one which completion.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import reprlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from posttrain.errors import ConfigError, UserError
from posttrain.rewards.coroutines import LOOP, EndedError, StuckError
from posttrain.rewards.deadline import Overdue, deadline
from posttrain.types import Content

RewardFunction = Callable[..., Any]
DEADLINE = 300.0
"""Seconds that a function may take over the completions of a step."""
LARGEST = 1e12
"""Of numbers far larger, squares and their sums are none in fp32 any more."""
LATE = "E-REWARD-0002"
"""The code of a function that does not answer in time."""


class RewardError(UserError):
    """A reward function that failed, or gave what is no reward."""

    code = "E-REWARD-0001"


def weighted_sum(rewards_NF: np.ndarray, weights_F: np.ndarray) -> np.ndarray:
    """`(N,)`: functions that say nothing of a completion add nothing; NaN where none that counts says anything: one of
    weight 0 is only watched."""
    total_N = np.nansum(rewards_NF * weights_F, axis=1)
    total_N[np.isnan(rewards_NF[:, weights_F != 0]).all(axis=1)] = np.nan
    return total_N


@dataclass(frozen=True)
class Completions:
    """What rewards are asked about: `contents[i]` is the completion (text, or messages) of `prompts[i]`; `columns` has
    a list for each column of the data."""

    prompts: Sequence[Content]
    contents: Sequence[Content]
    ids: Sequence[list[int]]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class Rewards:
    """`functions` by name, each with its weight. `extra` are keyword arguments that every function gets beside the
    data's columns; `seconds` is what each took last."""

    functions: Mapping[str, RewardFunction]
    weights: Sequence[float]
    deadline: float = DEADLINE
    extra: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.functions):
            raise ConfigError(f"reward_weights has {len(self.weights)} numbers for {len(self.functions)} functions")
        if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in self.weights):
            raise ConfigError(f"reward_weights={list(self.weights)!r} must be finite numbers")
        if not any(self.weights):
            raise ConfigError(f"reward_weights={list(self.weights)!r} leave nothing to learn from",
                              hint="a function of weight 0 is watched; give another one a weight")  # fmt: skip

    def __call__(self, asked: Completions) -> np.ndarray:
        """`(N, F)` in float64; NaN where a function says nothing. Raises RewardError."""
        values_NF = np.empty((len(asked), len(self.functions)))
        waiting = {}
        for i, (name, function) in enumerate(self.functions.items()):
            if is_asynchronous(function):
                waiting[i] = name
            else:
                values_NF[:, i] = self._checked(name, self._called(name, asked), asked)
        if waiting:
            for i, given in self._together(waiting, asked).items():
                values_NF[:, i] = self._checked(waiting[i], given, asked)
        return values_NF

    def _called(self, name: str, asked: Completions) -> Any:
        started, owner = time.monotonic(), os.getpid()
        try:
            with deadline(self.deadline):
                given = self.functions[name](**self._arguments(asked))
        except Overdue:
            raise self._late(name) from None
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit too, which would end the run without a word
            raise self._failed(name, error) from error
        finally:
            if os.getpid() != owner:  # the function has forked, and this is the child: it must not train as well
                os._exit(1)
            self.seconds[name] = time.monotonic() - started
        if self.seconds[name] > self.deadline and threading.current_thread() is threading.main_thread():
            raise self._late(name)  # it has swallowed what was to end it
        return given

    def _together(self, names: Mapping[int, str], asked: Completions) -> dict[int, Any]:
        """What coroutines give, all at once."""

        async def one(name: str) -> Any:
            started, owner = time.monotonic(), os.getpid()
            try:
                given = await asyncio.wait_for(self._awaited(name, asked), self.deadline)
                waiting.discard(name)
                return given
            except TimeoutError:
                raise self._late(name) from None
            finally:
                if os.getpid() != owner:  # the child of a fork, as in `_called`
                    os._exit(1)
                self.seconds[name] = time.monotonic() - started

        async def every() -> list[Any]:
            return await asyncio.gather(*(one(name) for name in names.values()))

        waiting = set(names.values())
        try:
            return dict(zip(names, LOOP.run(every, self.deadline + 1), strict=True))
        except StuckError as stuck:  # one waits without letting the others run, or does not let itself be ended
            raise self._late(stuck.task if stuck.task in waiting else " or ".join(sorted(waiting))) from None
        except EndedError as ended:
            raise self._failed(" or ".join(sorted(waiting)), ended.cause or ended) from ended

    async def _awaited(self, name: str, asked: Completions) -> Any:
        """What a coroutine gives. `asyncio` lets a SystemExit of one end everything, so it must not come so far."""
        if (task := asyncio.current_task()) is not None:
            task.set_name(name)
        try:
            return await self.functions[name](**self._arguments(asked))
        except (UserError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # it was we who gave it up
            raise self._failed(name, error) from error

    def _arguments(self, asked: Completions) -> dict[str, Any]:
        own = {"prompts": list(asked.prompts), "completions": list(asked.contents), "completion_ids": list(asked.ids)}
        return {**{name: list(values) for name, values in asked.columns.items()}, **self.extra, **own}

    def _late(self, name: str) -> RewardError:
        return RewardError(f"reward function {name!r} has not answered within {self.deadline:g} s",
                           code=LATE,
                           hint="give it a limit of its own, or raise reward_timeout")  # fmt: skip

    def _failed(self, name: str, error: BaseException) -> RewardError:
        return RewardError(f"reward function {name!r} failed: {type(error).__name__}: {_text_of(error)}",
                           hint="try it before training: posttrain reward test FILE.py --data DATA")  # fmt: skip

    def _checked(self, name: str, given: Any, asked: Completions) -> np.ndarray:
        count, values = _values(given, len(asked))
        if values is None:
            raise RewardError(f"reward function {name!r} gave {type(given).__name__}, not a list of numbers",
                              hint="return a number (or None) for each completion")  # fmt: skip
        if len(values) != len(asked):
            told = len(values) if len(values) < len(asked) else max(count, len(values))
            raise RewardError(f"reward function {name!r} gave {told} rewards for {len(asked)} completions",
                              hint="return a number (or None) for each completion")  # fmt: skip
        return np.array([self._number(name, value, i, asked) for i, value in enumerate(values)], dtype=np.float64)

    def _number(self, name: str, value: Any, index: int, asked: Completions) -> float:
        if value is None:
            return math.nan
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except Exception:  # it is the user's own object, which may raise anything
            number = math.nan
        if not abs(number) <= LARGEST:
            raise RewardError(f"reward function {name!r} gave {_repr_of(value)} for completion {index}: "
                              f"{shown(asked.contents[index])}",
                              hint=f"return a finite number, of no more than {LARGEST:g}, or None to say nothing of "
                              "it")  # fmt: skip
        return number


def _values(given: Any, wanted: int) -> tuple[int, list[Any] | None]:
    """How many it says it has, and its entries, of which one more than `wanted` is enough to know; None where it has
    none."""
    if isinstance(given, str | bytes | Mapping | set | frozenset):
        return 0, None
    try:  # no generator has a length, and no tensor that is one number
        return len(given), list(islice(given, wanted + 1))
    except Exception:  # it is the user's own object, which may raise anything
        return 0, None


def _repr_of(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a number of type {type(value).__name__}"


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(and it cannot say why)"


def name_of(function: RewardFunction) -> str:
    """A function's own name; of a model that of its files or its class."""
    inner = function.func if isinstance(function, functools.partial) else function
    config = getattr(inner, "config", None)
    if path := getattr(config, "_name_or_path", ""):
        return str(path).rstrip("/").split("/")[-1]
    return str(getattr(inner, "__name__", type(inner).__name__))


def is_asynchronous(function: RewardFunction) -> bool:
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def text_of(content: Content) -> str:
    """What a completion says: its text, or that of its messages."""
    if isinstance(content, str):
        return content
    return "\n".join(str(message.get("content") or "") for message in content)


def shown(content: Content, width: int = 80) -> str:
    text = text_of(content)
    return repr(text if len(text) <= width else text[:width] + "…")
