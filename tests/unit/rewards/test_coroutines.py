"""Asynchronous rewards: one event loop for all calls, and none that can hold up a run."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from posttrain.rewards.coroutines import Loop
from posttrain.rewards.functions import Completions, RewardError, Rewards

ASKED = Completions(["a", "b"], ["c", "d"], [[1], [2]], {})


def ask(function: Any, seconds: float = 5.0) -> np.ndarray:
    return Rewards({"mine": function}, [1.0], deadline=seconds)(ASKED)[:, 0]


def test_what_a_reward_keeps_lives_on_in_the_same_loop() -> None:
    """As a client's connections do: a queue with somebody waiting belongs to its loop."""
    kept: list[asyncio.Queue[float]] = []
    loops = []

    async def mine(completions: list[Any], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        if not kept:
            kept.append(asyncio.Queue())
        waiting = [asyncio.create_task(kept[0].get()) for _ in completions]
        await asyncio.sleep(0)
        for number in range(len(completions)):
            await kept[0].put(float(number))
        return list(await asyncio.gather(*waiting))

    for _ in range(3):
        assert ask(mine).tolist() == [0.0, 1.0]
    assert len({id(loop) for loop in loops}) == 1


def test_where_a_loop_runs_already() -> None:
    async def mine(completions: list[Any], **_: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    async def notebook() -> list[float]:
        return ask(mine).tolist()

    assert asyncio.run(notebook()) == [1.0, 1.0]


async def blocks(completions: list[Any], **_: Any) -> list[float]:
    time.sleep(8)
    return [1.0] * len(completions)


async def swallows(completions: list[Any], **_: Any) -> list[float]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with suppress(BaseException):
            await asyncio.sleep(20)
    return [1.0] * len(completions)


@pytest.mark.parametrize("function", [blocks, swallows])
def test_one_that_does_not_let_itself_be_ended_is_left_behind(function: Any) -> None:
    async def quick(completions: list[Any], **_: Any) -> list[float]:
        return [2.0] * len(completions)

    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'mine' has not answered within 0\.3 s"):
        ask(function, 0.3)
    assert time.monotonic() - started < 5
    assert ask(quick).tolist() == [2.0, 2.0]


def test_one_that_is_ended_leaves_the_loop_to_others() -> None:
    seen = []

    async def slow(completions: list[Any], **_: Any) -> list[float]:
        seen.append(asyncio.get_running_loop())
        await asyncio.sleep(60 if len(seen) == 1 else 0)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="has not answered"):
        ask(slow, 0.2)
    assert ask(slow).tolist() == [1.0, 1.0]
    assert seen[0] is seen[1]


def test_what_ends_the_loop_is_named_at_once() -> None:
    async def ends(completions: list[Any], **_: Any) -> list[float]:
        async def leave() -> None:
            sys.exit("no key")

        task = asyncio.get_running_loop().create_task(leave())
        await asyncio.sleep(5)
        return [float(task.done())] * len(completions)

    started = time.monotonic()
    with pytest.raises(RewardError, match="'mine' failed: SystemExit: no key"):
        ask(ends, 30.0)
    assert time.monotonic() - started < 5


def test_a_reward_may_ask_others() -> None:
    async def inner(completions: list[Any], **_: Any) -> list[float]:
        return [3.0] * len(completions)

    async def outer(completions: list[Any], **_: Any) -> list[float]:
        return list(ask(inner))

    assert ask(outer).tolist() == [3.0, 3.0]


def test_a_loop_that_has_died_is_made_anew() -> None:
    loop = Loop()

    async def work() -> int:
        return 7

    assert loop.run(work, 5) == 7
    assert loop._loop is not None
    loop._loop.call_soon_threadsafe(loop._loop.stop)
    assert loop._thread is not None
    loop._thread.join(5)
    assert loop.run(work, 5) == 7
