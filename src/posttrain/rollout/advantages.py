"""How much better a completion is than could be expected: rewards to advantages, for groups of completions of a prompt,
or token by token with a value function.

A reward may be missing (NaN: no function said anything of the completion). Such a completion is left out of every mean
and has advantage 0. Arrays are float64.

Shape suffixes: `G` groups (prompts), `K` completions of each, `F` reward functions, `N = G K`, `L` tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from posttrain.errors import ConfigError
from posttrain.rewards.functions import weighted_sum

TINY = 1e-4
"""Added to standard deviations, so that groups that agree divide by something."""
SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


class OfRound(NamedTuple):
    """What is said once of all completions of a round, as a sum and how many there are in it."""

    value: float
    number: int = 1


@dataclass(frozen=True)
class Advantages:
    """`value_N` of each completion; `reward_N` what it is made of (NaN where nothing was said); `without_signal` the
    share of completions whose rewards do not differ from those that they are compared with (None: they are compared
    with none); `metrics` sums and counts of what was found on the way. With a value function, `tokens` has an advantage
    and a return for every token of each completion; `divergence` is the mean KL divergence of a completion from the
    reference, where it is part of the reward."""

    value_N: np.ndarray
    reward_N: np.ndarray
    without_signal: float | None
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    tokens: list[tuple[np.ndarray, np.ndarray]] | None = None
    divergence: float = 0.0


def group_relative(
    rewards_NF: np.ndarray,
    weights_F: np.ndarray,
    group_size: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Advantages:
    """GRPO (arXiv 2402.03300, section 4.1.2): reward less the mean of its group, over the standard deviation of the
    group, of the whole batch (arXiv 2508.08221) or not at all (Dr. GRPO, arXiv 2503.20783). `normalize_then_sum` (GDPO,
    arXiv 2601.05242) does so for each function and then for the sum. Raises ConfigError for other names."""
    _check("scale_rewards", scale, SCALES)
    _check("multi_objective_aggregation", aggregation, AGGREGATIONS)
    reward_N = weighted_sum(rewards_NF, weights_F)
    if aggregation == "normalize_then_sum":
        grouped_GKF = rewards_NF.reshape(-1, group_size, rewards_NF.shape[1])
        centred_GKF = grouped_GKF - _mean(grouped_GKF, 1)
        normed_NF = (centred_GKF / (_deviation(grouped_GKF, 1) + TINY)).reshape(rewards_NF.shape)
        summed_N = weighted_sum(normed_NF, weights_F)
        deviation = _deviation(summed_N, 0)
        value_N = (summed_N - _mean(summed_N, 0)) / (deviation + TINY)
        return Advantages(np.nan_to_num(value_N), reward_N, float(np.isclose(deviation, 0).mean()))
    grouped_GK = reward_N.reshape(-1, group_size)
    centred_N = (grouped_GK - _mean(grouped_GK, 1)).reshape(-1)
    deviation_N = (
        np.broadcast_to(_deviation(reward_N, 0), reward_N.shape)
        if scale == "batch"
        else np.repeat(_deviation(grouped_GK, 1)[:, 0], group_size)
    )
    value_N = centred_N if scale == "none" else centred_N / (deviation_N + TINY)
    return Advantages(np.nan_to_num(value_N), reward_N, float(np.isclose(deviation_N, 0).mean()))


def leave_one_out(
    reward_N: np.ndarray, group_size: int, *, normalize: bool = False, clip: tuple[float, float] | None = None
) -> Advantages:
    """RLOO (arXiv 2402.14740, equation 9): reward less the mean of the others of its group."""
    if group_size < 2:
        raise ConfigError(f"num_generations={group_size}: RLOO compares a completion with others of its prompt",
                          hint="2 or more")  # fmt: skip
    reward_N = reward_N if clip is None else np.clip(reward_N, *clip)
    grouped_GK = reward_N.reshape(-1, group_size)
    others_G1 = (~np.isnan(grouped_GK)).sum(1, keepdims=True) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        value_N = (grouped_GK - (np.nansum(grouped_GK, 1, keepdims=True) - grouped_GK) / others_G1).reshape(-1)
    if normalize:
        value_N = (value_N - _mean(value_N, 0)) / (_deviation(value_N, 0) + TINY)
    without_signal = float(np.isclose(_deviation(grouped_GK, 1), 0).mean())
    return Advantages(np.nan_to_num(value_N, posinf=0.0, neginf=0.0), reward_N, without_signal)


def generalised(
    reward_L: np.ndarray, value_L: np.ndarray, discount: float = 1.0, trace: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) over the tokens of one completion, after whose
    last nothing comes: the advantages, and the returns that the value function is to learn."""
    next_value_L = np.append(value_L[1:], 0.0)
    surprise_L = reward_L + discount * next_value_L - value_L
    advantage_L, running = np.empty_like(surprise_L), 0.0
    for i in range(len(surprise_L) - 1, -1, -1):
        running = surprise_L[i] + discount * trace * running
        advantage_L[i] = running
    return advantage_L, advantage_L + value_L


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    with warnings.catch_warnings():  # of nothing
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(values, axis=axis, keepdims=True))


def _deviation(values: np.ndarray, axis: int) -> np.ndarray:
    """Of a sample (over n - 1); 0 where there is but one, or none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nan_to_num(np.asarray(np.nanstd(values, axis=axis, ddof=1, keepdims=True)))


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known", hint=f"known: {', '.join(known)}")
