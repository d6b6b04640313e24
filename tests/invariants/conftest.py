"""The server of short runs, started when the first test asks for it, and runs in this process for the cheaper tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.invariants.short_runs import RunServer


@pytest.fixture(scope="session")
def runs() -> Iterator[RunServer]:
    server = RunServer()
    yield server
    server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training in this process on one thread, which tiny models are quickest on, and without measuring how fast the
    machine is, which costs 0.2 s a run."""
    monkeypatch.setattr("posttrain.gauges.measure_limit", lambda *_: 1e12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
