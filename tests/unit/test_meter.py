"""Sums between two log lines: means, what a checkpoint keeps of them, and what an abandoned step must not take away."""

from __future__ import annotations

import json

import pytest
import torch

from posttrain.meter import Meter


def step(meter: Meter, loss: float, right: int, of: int) -> None:
    meter.start_step()
    meter.add({"accuracy": (torch.tensor(right), of)})
    meter.end_step(loss, tokens=10, supervised=of, flops=100.0)


def test_means_are_sums_over_counts() -> None:
    meter = Meter()
    step(meter, 2.0, right=1, of=1)
    step(meter, 4.0, right=0, of=9)
    assert meter.loss_sum / meter.steps == 3.0
    drained = meter.drain()
    assert drained["accuracy"] == 0.1  # over ten tokens, not over two steps
    assert drained["tokens_per_second"] == pytest.approx(2 * drained["supervised_tokens_per_second"])
    assert meter.state() == Meter().state()
    assert meter.drain() == {}


def test_a_metric_without_a_count_is_left_out() -> None:
    meter = Meter()
    meter.add({"accuracy": (torch.tensor(0), 0)})
    assert "accuracy" not in meter.drain()


def test_nothing_is_asked_of_the_device_before_it_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: asked.append(1) or original(tensor))
    meter = Meter()
    for _ in range(3):
        step(meter, 1.0, right=1, of=2)
    assert not asked
    assert meter.drain()["accuracy"] == 0.5
    assert len(asked) == 3


def test_metrics_hold_no_graph() -> None:
    meter = Meter()
    weight = torch.ones((), requires_grad=True)
    meter.add({"entropy": (weight * 2, 1)})
    assert not meter._pending[0][1]["entropy"][0].requires_grad


def test_an_abandoned_step_takes_only_itself_away() -> None:
    meter = Meter()
    step(meter, 1.0, right=3, of=4)
    meter.start_step()
    meter.add({"accuracy": (torch.tensor(100), 100)})
    meter.discard_step()
    assert meter.steps == 1
    assert meter.drain()["accuracy"] == 0.75


def test_state_goes_through_json_and_on() -> None:
    """The same log line whether or not a checkpoint lay between, in fp64 throughout."""
    one, other = Meter(), Meter()
    for meter in (one, other):
        step(meter, 0.1, right=1, of=3)
    other_state = json.loads(json.dumps(other.state()))
    other = Meter()
    other.load_state(other_state)
    for meter in (one, other):
        step(meter, 0.2, right=2, of=5)
    assert one.loss_sum == other.loss_sum == 0.1 + 0.2
    assert (one.steps, one.tokens, one.supervised, one.flops) == (2, 20, 8, 200.0)
    assert (other.steps, other.tokens, other.supervised, other.flops) == (2, 20, 8, 200.0)
    assert one.drain()["accuracy"] == other.drain()["accuracy"] == 3 / 8


@pytest.mark.parametrize("name", ["min_reward", "clip_ratio/low_min", "max_reward", "clip_ratio/high_max"])
def test_extremes_are_of_a_step_however_it_was_cut(name: str) -> None:
    meter, best = Meter(), min if "min" in name else max
    for values in ([0.25, 0.5], [0.75]):
        meter.start_step()
        for value in values:
            meter.add({name: (torch.tensor(value), 1)})
        meter.end_step(0.0, tokens=1, supervised=1, flops=0.0)
    assert meter.drain()[name] == (best(0.25, 0.5) + 0.75) / 2
