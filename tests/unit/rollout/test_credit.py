"""Rewards, advantages and returns of tokens beside sums written out; adaptive KL control beside its paper."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from posttrain import ConfigError
from posttrain.rollout.credit import Credit, credit, whitened
from posttrain.rollout.generation import Rollout
from posttrain.rollout.kl_control import KLControl

LENGTHS = (3, 5, 1)
SCORES = np.array([0.7, -1.2, 0.4])
KL = 0.3


def rollouts(reference: bool = True) -> list[Rollout]:
    draw = np.random.default_rng(0)
    made = []
    for place, length in enumerate(LENGTHS):
        old, ref, value = (draw.normal(size=length).astype(np.float32) for _ in range(3))
        ids = np.arange(length)
        one = Rollout(place, place, ids, ids, np.ones(length, bool), place != 1, old_logp_R=old, old_value_R=value)
        one.ref_logp_R = ref if reference else None
        made.append(one)
    return made


def plain(rounds: list[Rollout], how: Credit, coef: float) -> tuple[list[float], list[float]]:
    """Advantages and returns of all tokens, by the sums that GAE (arXiv 1506.02438, equation 16) stands for."""
    rewards = []
    for one, score in zip(rounds, SCORES.tolist(), strict=True):
        score -= 0.0 if one.is_ended else how.missing_end
        for t in range(one.num_rows):
            x = 0.0 if one.ref_logp_R is None else float(one.ref_logp_R[t]) - float(one.old_logp_R[t])  # type: ignore
            kl = -x if how.estimator == "k1" else math.exp(x) - 1 - x
            rewards.append(-coef * kl + (score if t == one.num_rows - 1 else 0.0))
    if how.whiten_rewards:
        mean = sum(rewards) / len(rewards)
        variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
        rewards = [(r - mean) / math.sqrt(variance + 1e-8) + mean for r in rewards]
    raw, returns, first = [], [], 0
    for one in rounds:
        n, values = one.num_rows, [*one.old_value_R.tolist(), 0.0]  # type: ignore[union-attr]
        errors = [rewards[first + t] + how.discount * values[t + 1] - values[t] for t in range(n)]
        for t in range(n):
            raw.append(sum((how.discount * how.trace) ** i * errors[t + i] for i in range(n - t)))
            returns.append(raw[-1] + values[t])
        first += n
    mean = sum(raw) / len(raw)
    variance = sum((a - mean) ** 2 for a in raw) / (len(raw) - 1)
    return [(a - mean) / math.sqrt(variance + 1e-8) for a in raw], returns


@pytest.mark.parametrize(
    "how",
    [
        Credit(),
        Credit("k3"),
        Credit(discount=0.9, trace=0.7),
        Credit(trace=0.0),
        Credit(trace=1.0, whiten_rewards=True),
        Credit(missing_end=1.5),
    ],
    ids=str,
)
def test_what_every_token_has_earned(how: Credit) -> None:
    rounds = rollouts()
    made = credit(SCORES, rounds, KL, how)
    advantages, returns = plain(rounds, how, KL)
    assert made.tokens is not None
    assert [len(advantage_R) for advantage_R, _ in made.tokens] == list(LENGTHS)
    assert np.concatenate([one for one, _ in made.tokens]).tolist() == pytest.approx(advantages, rel=1e-9, abs=1e-12)
    assert np.concatenate([one for _, one in made.tokens]).tolist() == pytest.approx(returns, rel=1e-9, abs=1e-12)
    assert made.value_N[2] == pytest.approx(advantages[-1])


def test_what_is_logged_of_a_round() -> None:
    rounds = rollouts()
    made = credit(SCORES, rounds, KL, Credit(missing_end=1.0))
    found = {name: total / count for name, (total, count) in made.metrics.items()}
    kl = sum(float((one.old_logp_R - one.ref_logp_R).sum()) for one in rounds) / 3  # type: ignore[operator, union-attr]
    scores = (SCORES.sum() - 1.0) / 3
    assert found == pytest.approx({
        "objective/kl": kl, "objective/scores": scores, "objective/non_score_reward": -KL * kl,
        "objective/rlhf_reward": scores - KL * kl, "objective/kl_coef": KL,
        "objective/entropy": -sum(float(one.old_logp_R.sum()) for one in rounds) / 3,  # type: ignore[union-attr]
    }, rel=1e-6)  # fmt: skip
    assert made.divergence == pytest.approx(kl, rel=1e-6)


def test_without_a_reference_and_without_tokens() -> None:
    rounds = rollouts(reference=False)
    rounds[1].supervised[:] = False
    rounds[1].old_logp_R = rounds[1].old_value_R = None
    made = credit(SCORES, rounds, 0.0, Credit())
    assert made.tokens is not None
    assert [len(one) for one, _ in made.tokens] == [3, 0, 1]
    assert "objective/kl" not in made.metrics
    assert made.metrics["objective/non_score_reward"] == (0.0, 3)
    assert made.value_N[1] == 0.0


def test_whitening_of_one_value() -> None:
    assert whitened(np.array([3.0]), shifts=False).tolist() == pytest.approx([3.0])
    assert whitened(np.zeros(0)).tolist() == []


def test_control_follows_ziegler() -> None:
    """arXiv 1909.08593, section 2.2: the error is bounded by a fifth, and corrected over the horizon."""
    control = KLControl(0.2, target=6.0, horizon=1000.0)
    expected = 0.2
    for divergence, error in ((6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (-5.0, -0.2), (5.7, -0.05)):
        control.follow(divergence, 64)
        expected *= 1 + error * 64 / 1000
        assert control.coef == pytest.approx(expected, rel=1e-12)
    control.restart()
    assert control.coef == 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Credit("k2"), "kl_estimator='k2' is not known"),
        (lambda: Credit(discount=1.1), "gamma=1.1 must be from 0 to 1"),
        (lambda: Credit(trace=-1.0), "lam=-1.0 must be from 0 to 1"),
        (lambda: Credit(missing_end=-1.0), "missing_eos_penalty=-1.0 must be above 0"),
        (lambda: KLControl(0.0), "kl_coef=0.0 must be above 0"),
        (lambda: KLControl(0.1, target=0.0), "target=0.0 must be above 0"),
        (lambda: KLControl(0.1, horizon=-1.0), "horizon=-1.0 must be above 0"),
        (lambda: KLControl(0.1, horizon=20.0).check_fits(100), "horizon=20 is too short for rounds of 100"),
    ],
)
def test_settings_that_mean_nothing(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
