"""Every loss over pairs beside a slow plain one, written from its paper for one pair at a time, in float64: values, and
gradients down to the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain import ConfigError
from posttrain.objectives.dpo import F_DIVERGENCES, LOSSES, OF_ANY_DIVERGENCE, SMOOTHED, PreferenceLoss, Settings
from tests.pair_batches import answers, outputs_of, pair_batch, random_logits, references

BATCH = pair_batch()
BETA, EPSILON, TAU, GAMMA, ALPHA = 0.3, 0.15, 0.2, 0.7, 0.4
Tensor = torch.Tensor


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


class Pair:
    """Both answers' log-probabilities, token by token, and what papers make of them."""

    def __init__(self, won: Tensor, lost: Tensor, ref_won: Tensor, ref_lost: Tensor, f: Callable[[Tensor], Tensor]):
        self.w, self.l = won.sum(), lost.sum()
        self.ref_w, self.ref_l = ref_won.sum(), ref_lost.sum()
        self.n_w, self.n_l = len(won), len(lost)
        self.ratio_w, self.ratio_l = self.w - self.ref_w, self.l - self.ref_l
        self.score_w, self.score_l = f(self.ratio_w.exp()), f(self.ratio_l.exp())
        self.d = self.score_w - self.score_l


def kl_to_smoothed(p: Pair) -> Tensor:
    """KL(policy's preference || labels), as a sum over both outcomes."""
    q = torch.stack([sig(BETA * p.d), sig(-BETA * p.d)])
    labels = torch.tensor([1 - EPSILON, EPSILON], dtype=torch.float64)
    return (q * (q / labels).log()).sum()


def nca(p: Pair) -> Tensor:
    """Equation 10 of arXiv 2402.05369 with K = 2 and all of the reward on the chosen answer."""
    return -sig(BETA * p.ratio_w).log() - 0.5 * sum(sig(-BETA * r).log() for r in (p.ratio_w, p.ratio_l))


def discopop(p: Pair) -> Tensor:
    rho = BETA * p.d
    share = sig(rho / TAU)
    return (1 - share) * -sig(rho).log() + share * torch.exp(-rho)


def smoothed(x: Tensor) -> Tensor:
    return -(1 - EPSILON) * sig(BETA * x).log() - EPSILON * sig(-BETA * x).log()


PLAIN: dict[str, Callable[[Pair], Tensor]] = {
    "sigmoid": lambda p: -sig(BETA * p.d).log(),
    "hinge": lambda p: (1 - BETA * p.d).clamp(min=0),
    "ipo": lambda p: (p.score_w / p.n_w - p.score_l / p.n_l - 1 / (2 * BETA)) ** 2,
    "exo_pair": kl_to_smoothed,
    "nca_pair": nca,
    "robust": lambda p: (-(1 - EPSILON) * sig(BETA * p.d).log() + EPSILON * sig(-BETA * p.d).log()) / (1 - 2 * EPSILON),
    "bco_pair": lambda p: -sig(BETA * p.ratio_w).log() - sig(-BETA * p.ratio_l).log(),
    "sppo_hard": lambda p: (p.ratio_w - 1 / (2 * BETA)) ** 2 + (p.ratio_l + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda p: (1 - sig(BETA * p.ratio_w)) + sig(BETA * p.ratio_l),
    "apo_down": lambda p: sig(BETA * p.ratio_w) + (1 - sig(BETA * (p.ratio_w - p.ratio_l))),
    "discopop": discopop,
    "sigmoid_norm": lambda p: -sig(BETA * (p.score_w / p.n_w - p.score_l / p.n_l)).log(),
    "simpo": lambda p: smoothed(p.w / p.n_w - p.l / p.n_l - GAMMA / BETA),
    "cpo": lambda p: smoothed(p.w - p.l),
}
"""Losses of one pair."""


def aot(pairs: list[Pair], *, unpaired: bool) -> Tensor:
    """The k-th largest of one against the k-th largest of the other (arXiv 2406.05882)."""
    if unpaired:
        one, other = [p.ratio_w for p in pairs], [p.ratio_l for p in pairs]
    else:
        one, other = [p.w - p.l for p in pairs], [p.ref_w - p.ref_l for p in pairs]
    ranked = zip(sorted(one, key=float), sorted(other, key=float), strict=True)
    return torch.stack([smoothed(x - y) for x, y in ranked]).mean()


def sft(pairs: list[Pair]) -> Tensor:
    return torch.stack([-p.w for p in pairs]).sum() / sum(p.n_w for p in pairs)


WHOLE: dict[str, Callable[[list[Pair]], Tensor]] = {
    "aot": lambda pairs: aot(pairs, unpaired=False),
    "aot_unpaired": lambda pairs: aot(pairs, unpaired=True),
    "sft": sft,
}
"""Losses of a batch."""

F: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: u.log(),
    "forward_kl": lambda u: 1 - 1 / u,
    "js_divergence": lambda u: (2 * u / (1 + u)).log(),
    "alpha_divergence": lambda u: (1 - u ** (ALPHA - 1)) / (1 - ALPHA),
}
"""f' of f-DPO's table 1 (constants differ: they cancel in the difference)."""


def pairs_of_logits(
    z_RV: Tensor, f: Callable[[Tensor], Tensor] = F["reverse_kl"], ld: float | None = None
) -> list[Pair]:
    assert BATCH.pairs_P2 is not None
    said, ref, made = answers(z_RV, BATCH), references(BATCH), []
    for i, j in BATCH.pairs_P2.tolist():
        four = [said[i], said[j], ref[i], ref[j]]
        pair = Pair(*four, f)
        if ld is not None:  # LD-DPO: beyond the shorter answer's length, tokens weigh `ld`
            shorter = min(pair.n_w, pair.n_l)
            n_w, n_l = pair.n_w, pair.n_l
            pair = Pair(*(torch.cat([x[:shorter], ld * x[shorter:]]) for x in four), f)
            pair.n_w, pair.n_l = n_w, n_l
        made.append(pair)
    return made


def settings(name: str, **options: Any) -> Settings:
    smoothing = EPSILON if name in SMOOTHED else 0.0
    return Settings(beta=BETA, label_smoothing=smoothing, discopop_tau=TAU, simpo_gamma=GAMMA, f_alpha=ALPHA, **options)


def ours(loss: PreferenceLoss, z_RV: Tensor) -> Tensor:
    """The mean, as the loop makes it."""
    terms, metrics = loss(outputs_of(z_RV, BATCH, loss.needs), BATCH)
    assert metrics["rewards/margins"][1] == 5
    ((unit, term),) = terms.items()
    assert (unit == "pairs") == loss.is_sum
    return term / (BATCH.counts["pairs"] if unit == "pairs" else 1)


def plain(name: str, pairs: list[Pair]) -> Tensor:
    return WHOLE[name](pairs) if name in WHOLE else torch.stack([PLAIN[name](pair) for pair in pairs]).mean()


def assert_same(loss: PreferenceLoss, slow: Callable[[Tensor], Tensor]) -> None:
    """Values and gradients of the logits."""
    z_RV, other_RV = random_logits(BATCH), random_logits(BATCH)
    value, expected = ours(loss, z_RV), slow(other_RV)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert other_RV.grad is not None
    torch.testing.assert_close(z_RV.grad, other_RV.grad, rtol=1e-10, atol=1e-12)
    assert other_RV.grad.abs().max() > 1e-4


def test_every_loss_has_its_plain_one() -> None:
    assert {*PLAIN, *WHOLE} == {*LOSSES}
    assert {*F} == {*F_DIVERGENCES}


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str) -> None:
    assert_same(PreferenceLoss((name,), (1.0,), settings(name)), lambda z: plain(name, pairs_of_logits(z)))


@pytest.mark.parametrize("divergence", F)
@pytest.mark.parametrize("name", [name for name in OF_ANY_DIVERGENCE if name != "sft"])
def test_divergence(name: str, divergence: str) -> None:
    loss = PreferenceLoss((name,), (1.0,), settings(name, f_divergence=divergence))
    assert_same(loss, lambda z: plain(name, pairs_of_logits(z, F[divergence])))


def test_an_alpha_of_one_is_reverse_kl() -> None:
    one = PreferenceLoss(settings=Settings(beta=BETA, f_divergence="alpha_divergence", f_alpha=1.0))
    assert_same(one, lambda z: plain("sigmoid", pairs_of_logits(z)))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard", "aot"])
def test_length_desensitised(name: str, alpha: float) -> None:
    loss = PreferenceLoss((name,), (1.0,), settings(name), ld_alpha=alpha)
    assert_same(loss, lambda z: plain(name, pairs_of_logits(z, ld=alpha)))


def test_supervision_is_not_desensitised() -> None:
    loss = PreferenceLoss(("sft", "sigmoid"), (1.0, 0.0), settings("sft"), ld_alpha=0.1)
    assert_same(loss, lambda z: plain("sft", pairs_of_logits(z)))


def test_mixture() -> None:
    names, weights = ("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)

    def slow(z_RV: Tensor) -> Tensor:
        pairs = pairs_of_logits(z_RV)
        return torch.stack([weight * plain(name, pairs) for name, weight in zip(names, weights, strict=True)]).sum()

    assert_same(PreferenceLoss(names, weights, settings("sigmoid")), slow)


def test_weighted_by_the_policy() -> None:
    """WPO, equation 2: the mean over tokens of log p(token) - log sum_v p(v)^2, for both answers; held constant."""

    def slow(z_RV: Tensor) -> Tensor:
        p_RV = z_RV.detach().softmax(-1)
        aligned_R = p_RV.gather(1, BATCH.target_R[:, None])[:, 0].log() - p_RV.square().sum(1).log()
        means = [aligned_R[BATCH.sequence_R == index].mean() for index in range(BATCH.num_sequences)]
        assert BATCH.pairs_P2 is not None
        weights = [(means[i] + means[j]).exp() for i, j in BATCH.pairs_P2.tolist()]
        losses = [PLAIN["sigmoid"](pair) for pair in pairs_of_logits(z_RV)]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).mean()

    assert_same(PreferenceLoss(settings=Settings(beta=BETA), use_weighting=True), slow)


def test_without_a_difference_from_the_reference_rewards_are_zero() -> None:
    z_RV = random_logits(BATCH)
    loss = PreferenceLoss()
    outputs = outputs_of(z_RV, BATCH, loss.needs)
    terms, metrics = loss(outputs, BATCH.with_columns(ref_logp_R=outputs.logp_R.detach()))
    assert terms["pairs"].item() == pytest.approx(5 * math.log(2), rel=1e-12)
    assert metrics["rewards/chosen"][0].item() == metrics["rewards/margins"][0].item() == 0


def test_what_people_watch() -> None:
    z_RV, loss = random_logits(BATCH), PreferenceLoss(settings=Settings(beta=BETA))
    _, metrics = loss(outputs_of(z_RV, BATCH, loss.needs), BATCH)
    pairs = pairs_of_logits(z_RV)
    means = {name: total.item() / count for name, (total, count) in metrics.items()}
    for side in ("chosen", "rejected"):
        short = {"chosen": "w", "rejected": "l"}[side]
        ratios = [getattr(pair, f"ratio_{short}").item() for pair in pairs]
        assert means[f"rewards/{side}"] == pytest.approx(BETA * sum(ratios) / 5, rel=1e-12)
        assert means[f"logps/{side}"] == pytest.approx(sum(getattr(p, short).item() for p in pairs) / 5, rel=1e-12)
    margins = [(pair.ratio_w - pair.ratio_l).item() for pair in pairs]
    assert means["rewards/accuracies"] == pytest.approx(sum(margin > 0 for margin in margins) / 5)
    assert means["rewards/margins"] == pytest.approx(BETA * sum(margins) / 5, rel=1e-12)
    logp_RV = z_RV.log_softmax(-1)
    assert means["entropy"] == pytest.approx(-(logp_RV.exp() * logp_RV).sum(-1).mean().item(), rel=1e-12)
    assert BATCH.pairs_P2 is not None
    chosen_R = torch.isin(BATCH.sequence_R, BATCH.pairs_P2[:, 0])
    assert means["logits/chosen"] == pytest.approx(z_RV[chosen_R].mean().item(), rel=1e-12)
    assert means["logits/rejected"] == pytest.approx(z_RV[~chosen_R].mean().item(), rel=1e-12)
    right_R = z_RV.argmax(-1) == BATCH.target_R
    assert means["mean_token_accuracy"] == pytest.approx(right_R[chosen_R].double().mean().item())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"losses": ("sigmoids",)}, "loss_type='sigmoids' is not known"),
        ({"losses": ("sigmoid", "sft")}, "loss_weights has 1 numbers for 2"),
        ({"losses": ("sigmoid", "sft"), "weights": (True, 1.0)}, "are not all numbers"),
        ({"losses": ("sigmoid", "sft"), "weights": (0.0, 0.0)}, "leave nothing to learn"),
        ({"settings": Settings(beta=0.0)}, "beta=0.0 must be above 0"),
        ({"settings": Settings(beta=-1.0)}, "beta=-1.0 must be above 0"),
        ({"settings": Settings(f_divergence="kl")}, "f_divergence_type='kl' is not known"),
        ({"losses": ("bco_pair",), "settings": Settings(f_divergence="forward_kl")}, "no meaning for .*bco_pair"),
        ({"losses": ("robust",), "settings": Settings(label_smoothing=0.5)}, r"must be in \[0, 0.5\)"),
        ({"losses": ("exo_pair",)}, "must be above 0 with loss_type='exo_pair'"),
        ({"losses": ("simpo",), "settings": Settings(label_smoothing=1.5)}, r"must be in \[0, 1\]"),
        ({"settings": Settings(label_smoothing=0.1)}, "is not heeded by"),
        ({"losses": ("aot",), "use_weighting": True}, "use_weighting"),
        ({"ld_alpha": 1.5}, r"ld_alpha=1.5 must be in \[0, 1\]"),
    ],
)
def test_what_contradicts_itself_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PreferenceLoss(**options)
