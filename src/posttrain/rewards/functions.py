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
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

from posttrain.errors import ConfigError, UserError
from posttrain.types import Content

RewardFunction = Callable[..., Any]
DEADLINE = 300.0
"""Seconds that a function may take over the completions of a step."""
EVERY = 0.5
"""Processor seconds between two looks at the clock, once a function has used as many as it may take."""


LATE = "E-REWARD-0002"
"""The code of a function that does not answer in time."""


class RewardError(UserError):
    """A reward function that failed, or gave what is no reward."""

    code = "E-REWARD-0001"


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
                return self.functions[name](**self._arguments(asked))
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

    def _together(self, names: Mapping[int, str], asked: Completions) -> dict[int, Any]:
        """What coroutines give, all at once."""

        async def one(name: str) -> Any:
            started = time.monotonic()
            try:
                given = await asyncio.wait_for(self._awaited(name, asked), self.deadline)
                waiting.discard(name)
                return given
            except TimeoutError:
                raise self._late(name) from None
            finally:
                self.seconds[name] = time.monotonic() - started

        async def every() -> list[Any]:
            return await asyncio.gather(*(one(name) for name in names.values()))

        waiting = set(names.values())
        try:
            with deadline(self.deadline + 1):  # one that waits without letting the others run
                return dict(zip(names, in_a_loop(every), strict=True))
        except Overdue:
            raise self._late(" or ".join(sorted(waiting))) from None

    async def _awaited(self, name: str, asked: Completions) -> Any:
        """What a coroutine gives. `asyncio` lets a SystemExit of one end everything, so it must not come so far."""
        try:
            return await self.functions[name](**self._arguments(asked))
        except (UserError, KeyboardInterrupt, Overdue):
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
        return RewardError(f"reward function {name!r} failed: {type(error).__name__}: {error}",
                           hint="try it before training: posttrain reward test FILE.py --data DATA")  # fmt: skip

    def _checked(self, name: str, given: Any, asked: Completions) -> np.ndarray:
        if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__"):
            raise RewardError(f"reward function {name!r} gave {type(given).__name__}, not a list of numbers",
                              hint="return a number (or None) for each completion")  # fmt: skip
        if len(given) != len(asked):
            raise RewardError(f"reward function {name!r} gave {len(given)} rewards for {len(asked)} completions",
                              hint="return a number (or None) for each completion")  # fmt: skip
        return np.array([self._number(name, value, i, asked) for i, value in enumerate(given)], dtype=np.float64)

    def _number(self, name: str, value: Any, index: int, asked: Completions) -> float:
        if value is None:
            return math.nan
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(f"reward function {name!r} gave {value!r} for completion {index}: "
                              f"{shown(asked.contents[index])}",
                              hint="return a finite number, or None to say nothing of it")  # fmt: skip
        return number


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


def in_a_loop(work: Callable[[], Any]) -> Any:
    """Run a coroutine to its end; in a thread of its own where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(work()))
        except BaseException as error:  # handed on below
            errors.append(error)

    thread = threading.Thread(target=run, name="posttrain-rewards")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


class Overdue(BaseException):
    """Raised in the main thread where something takes too long; no `except Exception` in a reward swallows it."""


def _too_late(_number: int, _frame: FrameType | None) -> None:
    """A signal that comes after its time must not end us. Not SIG_IGN: programs that are started would inherit that,
    and a limit of their own with it (data/jinja.py has one)."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise Overdue in what runs inside after so many seconds. In the main thread alone: others cannot be interrupted.
    Not SIGALRM, which math-verify and others use for limits of their own.

    Two signals: what waits is reached by a thread's, what computes without letting another thread run (a regular
    expression on hostile text) by the kernel's timer of processor time."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
        yield
        return
    main, until = threading.get_ident(), time.monotonic() + seconds
    is_over = False

    def stop(number: int, _frame: FrameType | None) -> None:
        if not is_over and (number == signal.SIGUSR2 or time.monotonic() >= until):
            raise Overdue

    profiler, timed = signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF)
    is_profiled = profiler not in (signal.SIG_DFL, signal.SIG_IGN, _too_late) or timed[0] > 0  # someone else's
    if not is_profiled:
        signal.signal(signal.SIGPROF, stop)
        signal.siginterrupt(signal.SIGPROF, False)
        signal.setitimer(signal.ITIMER_PROF, seconds, EVERY)
    previous = signal.signal(signal.SIGUSR2, stop)
    is_free = previous in (signal.SIG_DFL, None)  # then `stop` stays: a signal that comes too late must not end us
    timer = threading.Timer(seconds, lambda: None if is_over else signal.pthread_kill(main, signal.SIGUSR2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        is_over = True
        timer.cancel()
        if not is_profiled:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, _too_late)
        if not is_free:
            signal.signal(signal.SIGUSR2, previous)
