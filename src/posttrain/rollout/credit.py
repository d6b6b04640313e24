"""Which token of a completion has earned how much: from a score, log-probabilities and values to an advantage and a
return of every token, as PPO learns from them.

Each token costs what it moves the policy away from the reference (arXiv 1909.08593, equation 2), the last one has the
score; generalised advantage estimation (arXiv 1506.02438) spreads both over the tokens before. Whitening, as in TRL,
brings the tokens of a round to variance 1, and advantages to mean 0.

Shape suffixes: `N` completions of a round, `R` tokens that the policy wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.errors import ConfigError
from posttrain.rollout.advantages import Advantages, OfRound, generalised
from posttrain.rollout.generation import Rollout

TINY = 1e-8
"""Added to variances."""
ESTIMATORS = ("k1", "k3")


@dataclass(frozen=True)
class Credit:
    """`estimator` of the KL divergence from log-ratios (http://joschu.net/blog/kl-approx.html): k1, the log-ratio
    itself, or k3, never negative; `discount` and `trace` are gamma and lambda; `missing_end` is what a completion loses
    that was cut off."""

    estimator: str = "k1"
    discount: float = 1.0
    trace: float = 0.95
    whiten_rewards: bool = False
    missing_end: float = 0.0

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"kl_estimator={self.estimator!r} is not known", hint=f"known: {', '.join(ESTIMATORS)}")
        for name, value in (("gamma", self.discount), ("lam", self.trace)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} must be from 0 to 1")
        if self.missing_end < 0:
            raise ConfigError(f"missing_eos_penalty={self.missing_end} must be above 0: it is subtracted")


def credit(score_N: np.ndarray, rollouts: Sequence[Rollout], kl_coef: float, how: Credit) -> Advantages:
    """`score_N` without the penalty for a missing end. Rollouts have what policy and value head said of them, and the
    reference unless `kl_coef` is 0; one without tokens earns nothing."""
    cut_N = np.array([not one.is_ended for one in rollouts])
    judged_N = score_N - how.missing_end * cut_N
    kls = [_divergence(one, how.estimator) for one in rollouts]
    rewards = [-kl_coef * kl_R for kl_R in kls]
    for reward_R, score in zip(rewards, judged_N.tolist(), strict=True):
        reward_R[-1:] += score
    lengths = [len(reward_R) for reward_R in rewards]
    if how.whiten_rewards:
        rewards = _parted(whitened(np.concatenate(rewards), shifts=False), lengths)
    pairs = [
        generalised(reward_R, _double(one.old_value_R), how.discount, how.trace)
        for reward_R, one in zip(rewards, rollouts, strict=True)
    ]
    advantages = _parted(whitened(np.concatenate([advantage_R for advantage_R, _ in pairs])), lengths)
    tokens = [(advantage_R, return_R) for advantage_R, (_, return_R) in zip(advantages, pairs, strict=True)]
    mean_N = np.array([advantage_R.mean() if len(advantage_R) else 0.0 for advantage_R in advantages])
    kl_N = np.array([kl_R.sum() for kl_R in kls])
    surprise_N = np.array([-_double(one.old_logp_R).sum() for one in rollouts])
    found = {
        "objective/entropy": surprise_N,
        "objective/non_score_reward": -kl_coef * kl_N,
        "objective/rlhf_reward": judged_N - kl_coef * kl_N,
        "objective/scores": judged_N,
    }
    if kl_coef:  # else no reference was asked
        found["objective/kl"] = kl_N
    metrics = {name: (float(value_N.sum()), len(rollouts)) for name, value_N in found.items()}
    metrics["objective/kl_coef"] = OfRound(kl_coef)
    return Advantages(mean_N, score_N, None, metrics, tokens, float(kl_N.mean()))


def whitened(values: np.ndarray, shifts: bool = True) -> np.ndarray:
    """Variance 1, and with `shifts` mean 0. One value alone has no variance, and keeps its size."""
    mean = values.mean() if len(values) else 0.0
    variance = values.var(ddof=1) if len(values) > 1 else 1.0
    return np.asarray((values - mean) / np.sqrt(variance + TINY) + (0.0 if shifts else mean))


def _divergence(one: Rollout, estimator: str) -> np.ndarray:
    """`(R,)`: of the policy from the reference, at each token."""
    if one.ref_logp_R is None:
        return np.zeros(one.num_rows)
    log_ratio_R = _double(one.old_logp_R) - one.ref_logp_R
    return log_ratio_R if estimator == "k1" else np.exp(-log_ratio_R) - 1 + log_ratio_R


def _double(values_R: np.ndarray | None) -> np.ndarray:
    """In float64; of a rollout without tokens nobody was asked."""
    return np.zeros(0) if values_R is None else values_R.astype(np.float64)


def _parted(values: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1])
