"""KTO, ORPO and reward modelling beside slow plain losses, one answer at a time, in float64: values and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from posttrain import ConfigError
from posttrain.evaluate.rewards import calibration_error, correlation
from posttrain.objectives.kto import RatedLoss
from posttrain.objectives.orpo import OddsRatioLoss, log1mexp
from posttrain.objectives.reward import RewardLoss
from posttrain.types import Outputs
from tests.pair_batches import answers, outputs_of, pair_batch, random_logits, references

Tensor = torch.Tensor


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# --- KTO ------------------------------------------------------------------------------------------------------------

RATED = pair_batch(("ref_logp", "label"))
"""The second answer to each prompt is the mismatched one."""
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}


def plain_kto(z_RV: Tensor, beta: float, with_point: bool) -> Tensor:
    said, ref = answers(z_RV, RATED), references(RATED)
    ratio = [(one.sum() - other.sum()) for one, other in zip(said, ref, strict=True)]
    assert RATED.pairs_P2 is not None
    pairs = RATED.pairs_P2.tolist()
    point = max(0.0, float(sum(ratio[j] for _, j in pairs) / len(pairs))) if with_point else 0.0
    losses = []
    for i, _ in pairs:
        if RATED.columns["label_S"][i]:
            losses.append(1.3 * (1 - sig(beta * (ratio[i] - point))))
        else:
            losses.append(0.6 * (1 - sig(beta * (point - ratio[i]))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: str, seed: int) -> None:
    """apo_zero_unpaired is the same without a reference point."""
    loss = RatedLoss(loss_type, 0.3, **WEIGHTS)
    z_RV, other_RV = random_logits(RATED, seed), random_logits(RATED, seed)
    terms, _ = loss(outputs_of(z_RV, RATED, loss.needs), RATED)
    expected = plain_kto(other_RV, 0.3, loss_type == "kto")
    assert terms.keys() == {"batches"}
    terms["batches"].backward()
    expected.backward()
    assert terms["batches"].item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(z_RV.grad, other_RV.grad, rtol=1e-10, atol=1e-13)


def test_the_points_seen_are_of_both_signs() -> None:
    loss = RatedLoss()
    points = [
        loss(outputs_of(random_logits(RATED, seed), RATED, loss.needs), RATED)[1]["kl"][0].item() for seed in range(4)
    ]
    assert min(points) == 0 < max(points)


def test_what_kto_watches() -> None:
    loss, z_RV = RatedLoss(beta=0.3), random_logits(RATED)
    _, metrics = loss(outputs_of(z_RV, RATED, loss.needs), RATED)
    said, ref = answers(z_RV, RATED), references(RATED)
    means = {name: total.item() / count for name, (total, count) in metrics.items()}
    assert RATED.pairs_P2 is not None
    rated = RATED.pairs_P2[:, 0].tolist()
    for side, wanted in (("chosen", True), ("rejected", False)):
        ones = [i for i in rated if bool(RATED.columns["label_S"][i]) is wanted]
        rewards = [0.3 * (said[i].sum() - ref[i].sum()).item() for i in ones]
        assert means[f"rewards/{side}"] == pytest.approx(np.mean(rewards), rel=1e-12)
        assert means[f"logps/{side}"] == pytest.approx(np.mean([said[i].sum().item() for i in ones]), rel=1e-12)
        rows = torch.isin(RATED.sequence_R, torch.tensor(ones))
        assert means[f"logits/{side}"] == pytest.approx(z_RV[rows].mean().item(), rel=1e-12)
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"], rel=1e-12)


@pytest.mark.parametrize("wrong", [{"loss_type": "x"}, {"beta": 0}, {"desirable_weight": -1}], ids=str)
def test_kto_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RatedLoss(**wrong)


# --- ORPO -----------------------------------------------------------------------------------------------------------

WITH_PROMPTS = pair_batch((), prompts=True)


def test_orpo() -> None:
    """Equations 4 to 7: odds of geometric means; the likelihood is of prompt and chosen answer."""
    loss = OddsRatioLoss(0.4)
    z_RV, other_RV = random_logits(WITH_PROMPTS), random_logits(WITH_PROMPTS)
    terms, metrics = loss(outputs_of(z_RV, WITH_PROMPTS, loss.needs), WITH_PROMPTS)
    counts = WITH_PROMPTS.counts
    value = terms["nll_tokens"] / counts["nll_tokens"] + terms["pairs"] / counts["pairs"]

    said, likely, ratios = answers(other_RV, WITH_PROMPTS), [], []
    for first in range(0, WITH_PROMPTS.num_sequences, 3):  # a prompt, the chosen answer, the rejected one
        prompt, chosen, rejected = said[first : first + 3]
        likely += [*prompt, *chosen]
        p, q = chosen.mean().exp(), rejected.mean().exp()
        ratios.append(-sig(((p / (1 - p)) / (q / (1 - q))).log()).log())
    expected = -torch.stack(likely).mean() + 0.4 * torch.stack(ratios).mean()
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(z_RV.grad, other_RV.grad, rtol=1e-10, atol=1e-13)
    nll, count = metrics["nll_loss"]
    assert nll.item() / count == pytest.approx(-torch.stack(likely).mean().item(), rel=1e-12)
    assert count == 15 - 5 + 16  # tokens of prompts but the first of each, and of chosen answers


@pytest.mark.parametrize("log_p", [-1e-12, -1e-6, -0.1, -0.693, -0.694, -5.0, -40.0])
def test_the_logarithm_of_what_is_left(log_p: float) -> None:
    x = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    value = log1mexp(x)
    value.backward()
    assert value.item() == pytest.approx(float(np.log(-np.expm1(log_p))), rel=1e-12)
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(-1 / np.expm1(-log_p), rel=1e-9)


def test_orpo_refuses() -> None:
    with pytest.raises(ConfigError, match="beta"):
        OddsRatioLoss(0.0)


# --- reward models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centering", [None, 0.0, 0.2])
@pytest.mark.parametrize("columns", [(), ("margin",)])
def test_reward(columns: tuple[str, ...], centering: float | None) -> None:
    batch = pair_batch(columns)
    scores = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    other = scores.detach().clone().requires_grad_()
    nothing = scores.new_zeros(0)
    terms, metrics = RewardLoss(centering)(Outputs(nothing, nothing.bool(), score_S=scores), batch)
    losses = []
    for pair in range(5):
        won, lost = other[2 * pair], other[2 * pair + 1]
        margin = batch.columns["margin_P"][pair].double() if columns else 0.0
        losses.append(-sig(won - lost - margin).log() + (centering or 0) * (won + lost) ** 2)
    expected = torch.stack(losses).sum()
    terms["pairs"].backward()
    expected.backward()
    assert terms["pairs"].item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(scores.grad, other.grad, rtol=1e-10, atol=1e-13)
    means = {name: total.item() / count for name, (total, count) in metrics.items()}
    difference = (scores[::2] - scores[1::2]).detach()
    assert means["accuracy"] == pytest.approx((difference > 0).double().mean().item())
    assert means["margin"] == pytest.approx(difference.mean().item(), rel=1e-12)
    assert means["mean_reward"] == pytest.approx(scores.mean().item(), rel=1e-12)
    assert (means["min_reward"], means["max_reward"]) == (scores.min().item(), scores.max().item())


def test_reward_refuses() -> None:
    with pytest.raises(ConfigError, match="center_rewards_coefficient"):
        RewardLoss(-1.0)


def test_calibration() -> None:
    """Sure by 0.9 and right nine times of ten is calibrated; sure of everything and right by half is not."""
    sure = float(np.log(0.9 / 0.1))
    assert calibration_error(np.array([sure] * 9 + [-sure])) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(np.array([50.0, -50.0])) == pytest.approx(0.5)


def test_correlation() -> None:
    lengths = np.array([3.0, 5.0, 9.0, 2.0])
    assert correlation(2 * lengths - 1, lengths) == pytest.approx(1.0)
    assert correlation(-lengths, lengths) == pytest.approx(-1.0)
    assert correlation(np.ones(4), lengths) == 0.0
