"""Advantages beside slow plain ones, one completion at a time, and what becomes of rewards that are missing."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest

from posttrain import ConfigError
from posttrain.rewards.functions import weighted_sum
from posttrain.rollout.advantages import generalised, group_relative, leave_one_out

NAN = math.nan
SIZE = 4
REWARDS = np.random.default_rng(0).normal(size=(12, 2))
WEIGHTS = np.array([1.0, 0.5])


def totals(rewards: np.ndarray = REWARDS) -> list[float]:
    return [sum(r * w for r, w in zip(row, WEIGHTS, strict=True)) for row in rewards]


def groups(values: list[float]) -> list[list[float]]:
    return [values[i : i + SIZE] for i in range(0, len(values), SIZE)]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_relative_to_the_group(scale: str) -> None:
    whole = statistics.stdev(totals())
    expected = []
    for group in groups(totals()):
        mean, spread = statistics.mean(group), {"group": statistics.stdev(group), "batch": whole}.get(scale)
        expected += [(r - mean) / (1 if spread is None else spread + 1e-4) for r in group]
    made = group_relative(REWARDS, WEIGHTS, SIZE, scale)
    assert made.value_N == pytest.approx(expected)
    assert made.reward_N == pytest.approx(totals())
    assert made.without_signal == 0


def test_each_function_by_itself_first() -> None:
    normed = np.empty_like(REWARDS)
    for f in range(2):
        column = REWARDS[:, f].tolist()
        flat = [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-4) for g in groups(column) for r in g]
        normed[:, f] = flat
    summed = totals(normed)
    expected = [(r - statistics.mean(summed)) / (statistics.stdev(summed) + 1e-4) for r in summed]
    made = group_relative(REWARDS, WEIGHTS, SIZE, aggregation="normalize_then_sum")
    assert made.value_N == pytest.approx(expected)
    assert made.reward_N == pytest.approx(totals())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
def test_relative_to_the_others(clip: tuple[float, float] | None, normalize: bool) -> None:
    values = totals() if clip is None else [min(max(r, clip[0]), clip[1]) for r in totals()]
    expected = []
    for group in groups(values):
        expected += [r - statistics.mean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]
    if normalize:
        mean, spread = statistics.mean(expected), statistics.stdev(expected)
        expected = [(a - mean) / (spread + 1e-4) for a in expected]
    made = leave_one_out(np.array(totals()), SIZE, normalize=normalize, clip=clip)
    assert made.value_N == pytest.approx(expected)


def test_groups_that_agree_have_no_signal() -> None:
    rewards = REWARDS.copy()
    rewards[4:8] = 1.0
    made = group_relative(rewards, WEIGHTS, SIZE)
    assert made.without_signal == pytest.approx(1 / 3)
    assert not made.value_N[4:8].any()
    assert made.value_N[:4].any()
    other = leave_one_out(weighted_sum(rewards, WEIGHTS), SIZE)
    assert other.without_signal == pytest.approx(1 / 3)
    assert not other.value_N[4:8].any()


@pytest.mark.parametrize("options", [{}, {"scale": "none"}, {"aggregation": "normalize_then_sum"}])
def test_completions_of_which_nothing_is_said(options: dict[str, Any]) -> None:
    """They count nowhere: the others have what they would have without them."""
    rewards = REWARDS.copy()
    rewards[2] = NAN
    made = group_relative(rewards, WEIGHTS, SIZE, **options)
    assert made.value_N[2] == 0
    assert math.isnan(made.reward_N[2])
    assert np.isfinite(made.value_N).all()
    if not options.get("aggregation"):
        alone = group_relative(np.delete(rewards[:4], 2, 0), WEIGHTS, 3, **options)
        assert np.delete(made.value_N[:4], 2) == pytest.approx(alone.value_N)
    left = leave_one_out(weighted_sum(rewards, WEIGHTS), SIZE)
    alone = leave_one_out(weighted_sum(np.delete(rewards[:4], 2, 0), WEIGHTS), 3)
    assert np.delete(left.value_N[:4], 2) == pytest.approx(alone.value_N)
    assert left.value_N[2] == 0


def test_a_function_that_says_nothing_of_one_completion() -> None:
    assert weighted_sum(np.array([[1.0, NAN], [NAN, NAN], [2.0, 4.0]]), WEIGHTS) == pytest.approx(
        [1.0, NAN, 4.0], nan_ok=True
    )


def test_a_group_of_which_all_but_one_or_all_are_missing() -> None:
    reward = np.array([1.0, NAN, NAN, NAN, NAN, NAN, NAN, NAN])
    for made in (group_relative(reward[:, None], np.ones(1), SIZE), leave_one_out(reward, SIZE)):
        assert not made.value_N.any()


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_generalised_advantages(discount: float, trace: float) -> None:
    """Equation 16, as the sum that it is."""
    draw = np.random.default_rng(1)
    reward, value = draw.normal(size=6), draw.normal(size=6)
    after = [*value[1:], 0.0]
    delta = [r + discount * v1 - v for r, v1, v in zip(reward, after, value, strict=True)]
    expected = [sum((discount * trace) ** (j - i) * delta[j] for j in range(i, 6)) for i in range(6)]
    advantage, returns = generalised(reward, value, discount, trace)
    assert advantage == pytest.approx(expected)
    assert returns == pytest.approx(np.array(expected) + value)


def test_names_that_are_none() -> None:
    with pytest.raises(ConfigError, match="scale_rewards='std'"):
        group_relative(REWARDS, WEIGHTS, SIZE, "std")
    with pytest.raises(ConfigError, match="multi_objective_aggregation"):
        group_relative(REWARDS, WEIGHTS, SIZE, aggregation="mean")
    with pytest.raises(ConfigError, match="num_generations=1"):
        leave_one_out(REWARDS[:, 0], 1)
