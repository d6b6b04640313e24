"""The server of short runs, started when the first test asks for it, and runs in this process for the cheaper tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from short_runs import RunServer


@pytest.fixture(scope="session")
def runs() -> Iterator[RunServer]:
    server = RunServer()
    yield server
    server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process without measuring how fast the machine is, which costs 0.2 s a run."""
    monkeypatch.setattr("posttrain.run.measure_limit", lambda *_: 1e12)
