"""PPO's loss beside a slow plain one, a token at a time in float64: value, gradients down to log-probabilities and
values, and finite differences of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain import ConfigError
from posttrain.objectives.ppo import PPOLoss
from posttrain.types import Batch, Outputs
from tests.unit.objectives.test_policy import LENGTHS, batch, outputs, values

Tensor = torch.Tensor
LOSS = PPOLoss(cliprange=0.2, cliprange_value=0.15, vf_coef=0.4)


def case(seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor, Outputs, Batch]:
    """Log-probabilities and values now, with what stands beside them."""
    logp, old, _, entropy = values(seed, spread)
    draw = torch.Generator().manual_seed(seed + 100)
    drawn = [torch.randn(sum(LENGTHS), generator=draw, dtype=torch.float64) for _ in range(4)]
    value = (drawn[0] + 0.3 * drawn[3]).requires_grad_()
    one = batch(old_logp_R=old, old_value_R=drawn[0], return_R=drawn[1], advantage_R=drawn[2])
    said = outputs(logp, entropy)
    return logp, value, Outputs(logp, said.is_top1_R, entropy_R=entropy, value_R=value), one


def plain(logp: Tensor, value: Tensor, one: Batch) -> tuple[Tensor, dict[str, float]]:
    """Schulman et al. (arXiv 1707.06347), equations 7 and 9, the value clipped as the ratio is."""
    low, high, c = 1 - LOSS.cliprange, 1 + LOSS.cliprange, LOSS.cliprange_value
    total, n = torch.zeros((), dtype=torch.float64), len(logp)
    seen: dict[str, float] = dict.fromkeys(("pg", "vf", "pg clipped", "vf clipped", "kl", "ratio"), 0.0)
    columns = {name: column.tolist() for name, column in one.columns.items()}
    for i in range(n):
        advantage, old_value, target = (columns[name][i] for name in ("advantage_R", "old_value_R", "return_R"))
        ratio = torch.exp(logp[i] - columns["old_logp_R"][i])
        held = ratio if low <= ratio <= high else torch.tensor(low if ratio < low else high, dtype=torch.float64)
        gain, held_gain = ratio * advantage, held * advantage
        policy = -(gain if gain < held_gain else held_gain)
        near = value[i] if abs(value[i] - old_value) <= c else torch.tensor(
            old_value + (c if value[i] > old_value else -c), dtype=torch.float64)  # fmt: skip
        error, near_error = (value[i] - target) ** 2, (near - target) ** 2
        worth = 0.5 * (error if error > near_error else near_error)
        total = total + (policy + LOSS.vf_coef * worth) / n
        for name, number in (("pg", policy), ("vf", worth), ("pg clipped", held_gain < gain),
                             ("vf clipped", near_error > error), ("ratio", ratio),
                             ("kl", 0.5 * (logp[i] - columns["old_logp_R"][i]) ** 2)):  # fmt: skip
            seen[name] += torch.as_tensor(number).item() / n
    return total, seen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.8])
def test_value_gradients_and_metrics(seed: int, spread: float) -> None:
    logp, value, said, one = case(seed, spread)
    terms, metrics = LOSS(said, one)
    expected, seen = plain(logp, value, one)
    made: Any = terms["tokens"] / one.counts["tokens"]
    assert made.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(made, (logp, value)), torch.autograd.grad(expected, (logp, value)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert ours.abs().max() > 0
    found = {name: float(total) / count for name, (total, count) in metrics.items()}
    names = {"loss/policy_avg": "pg", "loss/value_avg": "vf", "policy/clipfrac_avg": "pg clipped",
             "val/clipfrac_avg": "vf clipped", "policy/approxkl_avg": "kl", "val/ratio": "ratio"}  # fmt: skip
    assert {names[name]: found[name] for name in names} == pytest.approx(seen, rel=1e-10, abs=1e-14)
    assert seen["vf clipped"] > 0
    assert (seen["pg clipped"] > 0) == (spread == 0.8) or spread == 0.1


def test_gradients_are_finite_differences() -> None:
    logp, value, said, one = case(5, 0.6)

    def loss(logp: Tensor, value: Tensor) -> Tensor:
        return LOSS(Outputs(logp, said.is_top1_R, value_R=value), one)[0]["tokens"]

    assert torch.autograd.gradcheck(loss, (logp, value), eps=1e-7, atol=1e-6)


def test_clipped_tokens_have_no_gradient() -> None:
    """A ratio beyond the clip on the side that its advantage wants it on; a value beyond its own that is nearer to its
    return."""
    logp, value, said, one = case(1, 0.8)
    terms, _ = LOSS(said, one)
    of_logp, of_value = torch.autograd.grad(terms["tokens"], (logp, value))
    ratio, advantage = (logp - one.columns["old_logp_R"]).exp(), one.columns["advantage_R"]
    beyond = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    assert beyond.any()
    assert torch.equal(of_logp == 0, beyond)
    old, target = one.columns["old_value_R"], one.columns["return_R"]
    near = value.clamp(old - LOSS.cliprange_value, old + LOSS.cliprange_value)
    assert torch.equal(of_value == 0, (near - target) ** 2 > (value - target) ** 2)


@pytest.mark.parametrize("name", ["cliprange", "cliprange_value", "vf_coef"])
def test_settings_that_mean_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=-0.1 must be at least 0"):
        PPOLoss(**{name: -0.1})
