"""Sampling that runs out of memory: begun again with fewer rows, the same comes out."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.errors import OutOfMemoryError
from posttrain.models.lean_weights import LeanWeights
from posttrain.rollout.engines.local import LocalEngine, _Flight
from posttrain.rollout.fitting import RowsAtOnce, generate_fitting
from posttrain.rollout.sampling import Sampling
from tests.unit.rollout.test_local_engine import REQUESTS, engine, same

SAMPLING = Sampling(max_tokens=9, seed=3)
SHORT = MemoryError("not enough")


def fits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fourth step of more rows than `most` memory runs out."""
    step, taken = _Flight.step, dict[int, int]()

    def runs_out(flight: _Flight) -> None:
        taken[id(flight)] = taken.get(id(flight), 0) + 1
        if taken[id(flight)] == 4 and flight.engine.max_rows > most:
            raise SHORT
        step(flight)

    monkeypatch.setattr(_Flight, "step", runs_out)


@pytest.mark.parametrize(("most", "left"), [(64, 64), (5, 4), (2, 2), (1, 1)])
def test_it_goes_on_with_what_fits(most: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine().generate(REQUESTS, SAMPLING)
    fits(most, monkeypatch)
    sampler, landed = engine(), list[int]()
    assert same(generate_fitting(sampler, REQUESTS, SAMPLING, landed=landed.append), expected)
    assert sampler.max_rows == left
    assert sum(landed) == sum(request.count for request in REQUESTS)
    assert RowsAtOnce(sampler, 64).state() == ({} if left == 64 else {"sampling_rows": [64, left]})


def test_a_single_row_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fits(0, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="a single completion of up to 9 tokens, after a prompt of up to 6, "):
        generate_fitting(engine(), REQUESTS, SAMPLING)
    assert [message.split("Retried with ")[1][:5] for message in caplog.messages] == ["9 → 4", "4 → 2", "2 → 1"]


def test_weights_that_were_laid_out_in_part_are_laid_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, take, tried = engine().generate(REQUESTS, SAMPLING), LeanWeights.take, list[int]()

    def half(weights: LeanWeights, rows: int) -> None:
        tried.append(rows)
        if len(tried) == 2:  # the first is a trial
            weights.products()[0].take(False, rows)
            raise SHORT
        take(weights, rows)

    monkeypatch.setattr(LeanWeights, "take", half)
    assert same(generate_fitting(engine(), REQUESTS, SAMPLING), expected)
    assert tried == [2, 64, 4]


def test_other_failures_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(LocalEngine, "generate", fails)
    with pytest.raises(ValueError, match="no"):
        generate_fitting(engine(), REQUESTS, SAMPLING)


def test_rows_are_taken_up_again_only_where_as_many_are_asked_for() -> None:
    for asked, expected in ((64, 3), (32, 32)):
        sampler = engine(max_rows=asked)
        RowsAtOnce(sampler, asked).load_state({"sampling_rows": [64, 3]})
        assert sampler.max_rows == expected
