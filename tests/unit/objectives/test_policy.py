"""Every policy-gradient loss beside a slow plain one, written from its paper for one completion at a time, in float64:
values, and gradients down to the log-probabilities."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch

from posttrain import ConfigError
from posttrain.objectives.policy import AVERAGES, LOSSES, PolicyLoss, Settings
from posttrain.types import Batch, Layout, Origin, Outputs

Tensor = torch.Tensor
LENGTHS = (4, 7, 1, 5)
ADVANTAGES = (1.3, -0.8, 0.4, -1.7)
LOW, HIGH, LONGEST, BETA = 0.2, 0.3, 16, 0.07
TO = Settings(epsilon=LOW, epsilon_high=HIGH, sapo_temperature_pos=0.9, sapo_temperature_neg=1.2)


def batch(**columns: Tensor) -> Batch:
    rows = sum(LENGTHS)
    return Batch(
        input_ids_T=torch.zeros(rows, dtype=torch.long),
        position_ids_T=torch.zeros(rows, dtype=torch.long),
        layout=Layout(tuple(sum(LENGTHS[:i]) for i in range(len(LENGTHS))), LENGTHS),
        rows_R=torch.arange(rows),
        target_R=torch.zeros(rows, dtype=torch.long),
        sequence_R=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        sample_S=tuple(range(len(LENGTHS))),
        origins_S=(Origin("here", 0),) * len(LENGTHS),
        counts={"tokens": rows, "batch_tokens": rows, "sequences": len(LENGTHS), "batches": 1},
        columns={"advantage_S": torch.tensor(ADVANTAGES, dtype=torch.float64), **columns},
    )


def values(seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities now, when they were sampled, and the reference's; entropies."""
    draw = torch.Generator().manual_seed(seed)
    old = -torch.rand(sum(LENGTHS), generator=draw, dtype=torch.float64) * 3 - 0.1
    now = old + torch.randn(len(old), generator=draw, dtype=torch.float64) * spread
    reference = old + torch.randn(len(old), generator=draw, dtype=torch.float64) * 0.3
    return now.requires_grad_(), old, reference, torch.rand(len(old), generator=draw, dtype=torch.float64)


def outputs(now: Tensor, entropy: Tensor) -> Outputs:
    return Outputs(now, torch.zeros(len(now), dtype=torch.bool), entropy_R=entropy)


def loss_of(made: PolicyLoss, now: Tensor, entropy: Tensor, **columns: Tensor) -> Tensor:
    """As the loop has it: each sum over the count of its unit."""
    one = batch(**columns)
    terms, _ = made(outputs(now, entropy), one)
    total: Any = sum(value / one.counts[unit] for unit, value in terms.items())
    return total


# --- the plain ones ---------------------------------------------------------------------------------------------------


def surrogate(ratio: Tensor, advantage: float, delta: float | None) -> Tensor:
    free = ratio if delta is None or ratio < delta else torch.tensor(delta, dtype=ratio.dtype)
    held = (
        ratio if 1 - LOW <= ratio <= 1 + HIGH else torch.tensor(1 - LOW if ratio < 1 else 1 + HIGH, dtype=ratio.dtype)
    )
    one, other = free * advantage, held * advantage
    return -one if one < other else -other


def token_loss(name: str, logp: Tensor, ratio: Tensor, advantage: float, all_ratios: Tensor, **more: Any) -> Tensor:
    if name == "cispo":
        return -min(ratio.item(), HIGH) * advantage * logp
    if name == "sapo":
        tau = TO.sapo_temperature_pos if advantage > 0 else TO.sapo_temperature_neg
        return -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage
    if name == "vespo":
        k, lam = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        w = math.prod(all_ratios.tolist())
        return -(w**k) * math.exp(lam * (1 - w)) * advantage * logp
    return surrogate(ratio, advantage, more.get("delta"))


def plain(
    name: str,
    level: str,
    now: Tensor,
    old: Tensor,
    reference: Tensor | None = None,
    *,
    corrected: bool = False,
    kept: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    sequences = []
    for nows, olds, refs, keeps, advantage in zip(
        now.split(list(LENGTHS)),
        old.split(list(LENGTHS)),
        (now if reference is None else reference).split(list(LENGTHS)),
        (torch.ones_like(now) if kept is None else kept).split(list(LENGTHS)),
        ADVANTAGES,
        strict=True,
    ):
        ratios = torch.exp(nows - olds)
        used = ratios if level == "token" else ratios.log().mean().exp().expand(len(nows))
        losses = []
        for logp, ratio, ref, keep in zip(nows, used, refs, keeps, strict=True):
            loss = token_loss(name, logp, ratio, advantage, ratios, delta=delta) * keep
            if reference is not None:
                x = ref - logp
                divergence = torch.exp(x) - x - 1
                loss = loss + BETA * (divergence * ratio if corrected else divergence)
            losses.append(loss)
        sequences.append(torch.stack(losses))
    count = len(sequences)
    if name in ("grpo", "sapo"):
        return torch.stack([one.mean() for one in sequences]).mean()
    if name == "luspo":
        return torch.stack([one.sum() for one in sequences]).mean()
    total = torch.stack([one.sum() for one in sequences]).sum()
    return total / (count * LONGEST) if name == "dr_grpo" else total / sum(LENGTHS)


def assert_same(made: Tensor, expected: Tensor, now: Tensor) -> None:
    assert made.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    (one,) = torch.autograd.grad(made, now, retain_graph=True)
    (other,) = torch.autograd.grad(expected, now)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert one.abs().max() > 0


@pytest.mark.parametrize("spread", [0.05, 0.6])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str, level: str, spread: float) -> None:
    now, old, _, entropy = values(spread=spread)
    made = PolicyLoss(name, level, settings=TO, max_completion_length=LONGEST)
    assert_same(loss_of(made, now, entropy, old_logp_R=old), plain(name, level, now, old), now)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_divergence_from_the_reference(name: str, level: str, corrected: bool) -> None:
    now, old, reference, entropy = values(1)
    made = PolicyLoss(name, level, BETA, TO, LONGEST, corrected)
    expected = plain(name, level, now, old, reference, corrected=corrected)
    assert_same(loss_of(made, now, entropy, old_logp_R=old, ref_logp_R=reference), expected, now)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss is LOSSES["grpo"]])
def test_two_sides_are_bounded(name: str) -> None:
    now, old, _, entropy = values(2, spread=1.0)
    to = Settings(LOW, HIGH, delta=1.5)
    made = PolicyLoss(name, settings=to, max_completion_length=LONGEST)
    assert_same(loss_of(made, now, entropy, old_logp_R=old), plain(name, "token", now, old, delta=1.5), now)


def test_only_uncertain_tokens() -> None:
    now, old, _, entropy = values(3)
    made = PolicyLoss("dapo", settings=TO, top_entropy=0.3)
    kept = (entropy >= entropy.sort().values[-5]).double()  # 17 tokens: the quantile 0.7 lies between the 12th and 13th
    assert kept.sum() == 5
    assert_same(loss_of(made, now, entropy, old_logp_R=old), plain("dapo", "token", now, old, kept=kept), now)
    assert not made.is_sum


def test_bad_completions_left_behind() -> None:
    now, old, _, entropy = values(4)
    gone = [(o - n).mean().item() for n, o in zip(now.split(list(LENGTHS)), old.split(list(LENGTHS)), strict=True)]
    threshold = (gone[1] + gone[3]) / 2  # between the two bad ones
    kept = torch.cat([
        torch.full((n,), float(advantage >= 0 or one <= threshold), dtype=torch.float64)
        for n, advantage, one in zip(LENGTHS, ADVANTAGES, gone, strict=True)
    ])  # fmt: skip
    assert 0 < kept.sum() < len(kept)
    made = PolicyLoss("dapo", settings=TO, off_policy_threshold=threshold)
    assert_same(loss_of(made, now, entropy, old_logp_R=old), plain("dapo", "token", now, old, kept=kept), now)


@pytest.mark.parametrize("name", LOSSES)
def test_a_policy_that_has_not_moved(name: str) -> None:
    """Its own log-probabilities serve as the old ones: the same loss, and the same gradient."""
    now, *_, entropy = values(5)
    made = PolicyLoss(name, settings=TO, max_completion_length=LONGEST)
    assert_same(loss_of(made, now, entropy), plain(name, "token", now, now.detach()), now)


def test_metrics() -> None:
    now, old, reference, entropy = values(6)
    made = PolicyLoss("grpo", beta=BETA, settings=TO)
    _, metrics = made(outputs(now, entropy), batch(old_logp_R=old, ref_logp_R=reference))
    ratio = (now - old).exp()
    advantage = torch.tensor(ADVANTAGES).repeat_interleave(torch.tensor(LENGTHS))
    low, high = (ratio < 1 - LOW) & (advantage < 0), (ratio > 1 + HIGH) & (advantage > 0)
    found = {name: float(value) / count for name, (value, count) in metrics.items()}
    x = reference - now
    assert found == pytest.approx({
        "entropy": entropy.mean().item(), "kl": (x.exp() - x - 1).mean().item(),
        "clip_ratio/low_mean": low.double().mean().item(), "clip_ratio/high_mean": high.double().mean().item(),
        "clip_ratio/region_mean": (low | high).double().mean().item(),
        "clip_ratio/low_min": min(one.double().mean().item() for one in low.split(list(LENGTHS))),
        "clip_ratio/high_max": max(one.double().mean().item() for one in high.split(list(LENGTHS))),
    })  # fmt: skip
    assert 0 < found["clip_ratio/region_mean"] < 1


def test_the_least_that_is_clipped_from_below() -> None:
    """Of completions that are all bad, and in which all tokens but the first are clipped."""
    now, *_, entropy = values(6)
    one = batch(old_logp_R=now.detach() + 1)
    one.columns["advantage_S"].fill_(-1)
    for end, length in zip(accumulate(LENGTHS), LENGTHS, strict=True):
        if length > 1:
            one.columns["old_logp_R"][end - length] = now[end - length].detach()
    _, metrics = PolicyLoss("grpo", settings=TO)(outputs(now, entropy), one)
    assert metrics["clip_ratio/low_min"][0] == pytest.approx(min((n - 1) / n for n in LENGTHS if n > 1))
    assert metrics["clip_ratio/high_max"][0] == 0


def test_sequences_of_one_ratio_count_alike() -> None:
    now, old, _, entropy = values(6)
    old = old - 0.5 * torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    _, metrics = PolicyLoss("luspo", level="sequence", settings=TO)(outputs(now, entropy), batch(old_logp_R=old))
    log_ratios = (now - old).split(list(LENGTHS))
    ratio_S = torch.stack([one.mean().exp() for one in log_ratios])
    high_S = (ratio_S > 1 + HIGH) & (torch.tensor(ADVANTAGES) > 0)
    value, count = metrics["clip_ratio/high_mean"]
    assert float(value) / count == pytest.approx(high_S.double().mean().item())
    assert 0 < high_S.sum() < len(LENGTHS)
    assert metrics["clip_ratio/high_max"][0] == 1


def test_what_vespo_weighs_sequences_with() -> None:
    now, old, _, entropy = values(6)
    _, metrics = PolicyLoss("vespo", settings=TO)(outputs(now, entropy), batch(old_logp_R=old))
    expected = []
    for log_ratio, advantage in zip((now - old).split(list(LENGTHS)), ADVANTAGES, strict=True):
        w = math.exp(log_ratio.sum().item())
        k, rate = (TO.vespo_k_pos, TO.vespo_lambda_pos) if advantage >= 0 else (TO.vespo_k_neg, TO.vespo_lambda_neg)
        expected.append(w**k * math.exp(rate * (1 - w)))
    value, count = metrics["vespo/phi_seq_mean"]
    assert float(value) / count == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_without_the_bonus_is_said(name: str) -> None:
    now, old, _, entropy = values(6)
    bare = loss_of(PolicyLoss(name, settings=TO), now, entropy, old_logp_R=old)
    made = PolicyLoss(name, settings=TO, entropy_coef=0.3)
    _, metrics = made(outputs(now, entropy), batch(old_logp_R=old))
    value, count = metrics["policy_loss"]
    assert float(value) / count == pytest.approx(bare.item())
    assert loss_of(made, now, entropy, old_logp_R=old).item() == pytest.approx(
        bare.item() - 0.3 * entropy.mean().item()
    )


@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_are_sums(name: str) -> None:
    """Cut in two, the terms of the halves add up."""
    assert PolicyLoss(name).is_sum == (AVERAGES[name] != "batch tokens")


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "gppo"},
        {"level": "word"},
        {"beta": -1.0},
        {"top_entropy": 0.0},
        {"settings": Settings(epsilon=-0.1)},
        {"settings": Settings(delta=1.1)},
    ],
)
def test_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PolicyLoss(**options)
