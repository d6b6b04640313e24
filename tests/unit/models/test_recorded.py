"""Recordings as CUDA keeps them, with an allocator of our own in its place: memory that recordings share may be used
again only as long as some graph keeps it (`create_or_incref_pool` in torch's allocator)."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from posttrain.models import recorded


class Fake:
    """`users` of each pool, `order` of what was asked; a pool that nobody uses any more may not be used again."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self.seen: set[int] = set()
        self.order: list[str] = []
        self.on: list[Any] = []
        outer = self

        class Graph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                assert outer.on, "the stream that everything runs on cannot be recorded"
                assert pool not in outer.seen or outer.users[pool] > 0
                outer.seen.add(pool)
                outer.users[pool] += 1
                self.pool = pool
                outer.order.append("begin")

            def capture_end(self) -> None:
                outer.order.append("end")

            def __del__(self) -> None:
                outer.users[self.pool] -= 1

        class Stream:
            def __init__(self, *_: Any) -> None:
                pass

            def wait_stream(self, _: Any) -> None:
                outer.order.append("wait")

        self.Graph, self.Stream, self.main = Graph, Stream, Stream()

    @contextmanager
    def stream(self, one: Any) -> Iterator[None]:
        self.on.append(one)
        try:
            yield
        finally:
            self.on.pop()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    made = Fake()
    for name, value in {
        "CUDAGraph": made.Graph, "Stream": made.Stream, "stream": made.stream, "current_device": lambda: 0,
        "current_stream": lambda: made.main, "graph_pool_handle": lambda: 7,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    recorded._aside.cache_clear()
    yield made
    recorded._aside.cache_clear()


def test_memory_is_shared_although_recordings_come_and_go(fake: Fake) -> None:
    calls = []

    def step(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(fake.on))
        return x + 1

    for _ in range(3):
        one = recorded.Recording()
        one._record(step, (torch.zeros(2),))
        del one
        gc.collect()
    assert fake.users == {7: 1}  # the graph of nothing
    assert calls == [1] * 6  # once before, once for the recording, both aside


def test_one_that_fails_leaves_nothing_under_way(fake: Fake) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        if fake.order[-1] == "begin":
            raise torch.cuda.OutOfMemoryError
        return x

    with pytest.raises(torch.cuda.OutOfMemoryError):
        recorded.Recording()._record(fails, (torch.zeros(2),))
    assert fake.order[-2:] == ["end", "wait"]
    assert not fake.on
