"""Direct preference optimisation (arXiv 2305.18290) and its variants: one line each, beside the paper.

Each loss is a function of both sides of all pairs, `(P,)` in and out. With `r = log policy / reference` of an answer
and `d = score(r chosen) - score(r rejected)`, where `score` is the identity or another f-divergence's (f-DPO, arXiv
2309.16240, table 1). Some need no reference (SimPO, CPO). A mixture (MPO, arXiv 2411.10442) is a weighted sum of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch.nn.functional import logsigmoid

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics, Terms
from posttrain.objectives.pairs import Pairs, pairs_of, sum_by_sequence, watch, watch_tokens
from posttrain.types import Batch, Needs, Outputs


@dataclass(frozen=True)
class Settings:
    """`label_smoothing` is the share of labels taken to be flipped; `score` turns log-ratios into what is compared."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5

    def score(self, log_ratio: torch.Tensor) -> torch.Tensor:
        return F_DIVERGENCES[self.f_divergence](log_ratio, self.f_alpha)


def _delta(pairs: Pairs, to: Settings) -> torch.Tensor:
    return to.score(pairs.chosen.log_ratio_P) - to.score(pairs.rejected.log_ratio_P)


def _mean_delta(pairs: Pairs, to: Settings) -> torch.Tensor:
    """Per token of each answer."""
    chosen, rejected = pairs.chosen, pairs.rejected
    one, other = (to.score(side.log_ratio_P) / side.length_P.clamp(min=1) for side in (chosen, rejected))
    return one - other


# --- losses of a pair: `(Pairs, Settings) -> (P,)` --------------------------------------------------------------------


def sigmoid(pairs: Pairs, to: Settings) -> torch.Tensor:
    """DPO, equation 7: `-log sigmoid(beta d)`."""
    return -logsigmoid(to.beta * _delta(pairs, to))


def hinge(pairs: Pairs, to: Settings) -> torch.Tensor:
    """SLiC (arXiv 2305.10425) on log-ratios."""
    return torch.relu(1 - to.beta * _delta(pairs, to))


def ipo(pairs: Pairs, to: Settings) -> torch.Tensor:
    """IPO (arXiv 2310.12036, equation 17), beta its tau; log-ratios per token, as its authors run it."""
    return (_mean_delta(pairs, to) - 1 / (2 * to.beta)) ** 2


def exo_pair(pairs: Pairs, to: Settings) -> torch.Tensor:
    """EXO (arXiv 2402.00856, equation 16): KL from the smoothed labels to the policy's preference."""
    logit = to.beta * _delta(pairs, to)
    log_win, log_lose = logsigmoid(logit), logsigmoid(-logit)
    smoothing = to.label_smoothing
    return log_win.exp() * (log_win - math.log1p(-smoothing)) + log_lose.exp() * (log_lose - math.log(smoothing))


def nca_pair(pairs: Pairs, to: Settings) -> torch.Tensor:
    """NCA (arXiv 2402.05369) with one chosen and one rejected answer."""
    chosen, rejected = _rewards(pairs, to)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(pairs: Pairs, to: Settings) -> torch.Tensor:
    """Robust DPO (arXiv 2403.00409, equation 12), unbiased where `label_smoothing` of the labels are flipped."""
    logit, flipped = to.beta * _delta(pairs, to), to.label_smoothing
    return (-(1 - flipped) * logsigmoid(logit) + flipped * logsigmoid(-logit)) / (1 - 2 * flipped)


def bco_pair(pairs: Pairs, to: Settings) -> torch.Tensor:
    """BCO (arXiv 2404.04656) without its running mean."""
    chosen, rejected = _rewards(pairs, to)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, to: Settings) -> torch.Tensor:
    """SPPO (arXiv 2405.00675, equation 4.7) where the chosen answer always wins."""
    return (pairs.chosen.log_ratio_P - 0.5 / to.beta) ** 2 + (pairs.rejected.log_ratio_P + 0.5 / to.beta) ** 2


def aot(pairs: Pairs, to: Settings) -> torch.Tensor:
    """AOT for paired data (arXiv 2406.05882): margins of policy and reference compared in sorted order."""
    margin_P, ref_margin_P = (
        one - other
        for one, other in (
            (pairs.chosen.logp_P, pairs.rejected.logp_P),
            (pairs.chosen.ref_logp_P, pairs.rejected.ref_logp_P),
        )
    )
    return _smoothed(margin_P.sort().values - ref_margin_P.sort().values, to)


def aot_unpaired(pairs: Pairs, to: Settings) -> torch.Tensor:
    """AOT for unpaired data: chosen and rejected log-ratios compared in sorted order."""
    return _smoothed(pairs.chosen.log_ratio_P.sort().values - pairs.rejected.log_ratio_P.sort().values, to)


def apo_zero(pairs: Pairs, to: Settings) -> torch.Tensor:
    """APO-zero (arXiv 2408.06266, equation 7): the chosen answer is better than what the model would say."""
    chosen, rejected = _rewards(pairs, to)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, to: Settings) -> torch.Tensor:
    """APO-down (equation 8): even the chosen answer is worse than what the model would say."""
    chosen, rejected = _rewards(pairs, to)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def discopop(pairs: Pairs, to: Settings) -> torch.Tensor:
    """DiscoPOP (arXiv 2406.08414, equation 5): logistic and exponential loss, blended by the log-ratio."""
    logit = to.beta * _delta(pairs, to)
    blend = torch.sigmoid(logit / to.discopop_tau)
    return -logsigmoid(logit) * (1 - blend) + torch.exp(-logit) * blend


def sft(pairs: Pairs, to: Settings) -> torch.Tensor:
    """Negative log-likelihood of the chosen answers per token of the batch (RPO, arXiv 2404.19733; MPO)."""
    return (-pairs.chosen.plain_logp_P.sum() / pairs.chosen.length_P.sum().clamp(min=1)).expand_as(pairs.chosen.logp_P)


def sigmoid_norm(pairs: Pairs, to: Settings) -> torch.Tensor:
    """DPO on log-ratios per token (Tulu 3, arXiv 2411.15124, equation 6)."""
    return -logsigmoid(to.beta * _mean_delta(pairs, to))


def simpo(pairs: Pairs, to: Settings) -> torch.Tensor:
    """SimPO (arXiv 2405.14734, equation 6): log-probability per token as the reward, a margin `gamma`, no reference."""
    chosen, rejected = (side.logp_P / side.length_P.clamp(min=1) for side in (pairs.chosen, pairs.rejected))
    return _smoothed(chosen - rejected - to.simpo_gamma / to.beta, to)


def cpo(pairs: Pairs, to: Settings) -> torch.Tensor:
    """CPO's preference term (arXiv 2401.08417, equation 4): DPO against a uniform reference; its other is `sft`."""
    return _smoothed(pairs.chosen.logp_P - pairs.rejected.logp_P, to)


def _rewards(pairs: Pairs, to: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    return to.beta * pairs.chosen.log_ratio_P, to.beta * pairs.rejected.log_ratio_P


def _smoothed(delta: torch.Tensor, to: Settings) -> torch.Tensor:
    """`-log sigmoid(beta delta)` where `label_smoothing` of the labels may be flipped (conservative DPO)."""
    logit, smoothing = to.beta * delta, to.label_smoothing
    return -(1 - smoothing) * logsigmoid(logit) - smoothing * logsigmoid(-logit)


Loss = Callable[[Pairs, Settings], torch.Tensor]
LOSSES: dict[str, Loss] = {
    function.__name__: function
    for function in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
        discopop, sft, sigmoid_norm, simpo, cpo,
    )
}  # fmt: skip
WHOLE_BATCH = ("aot", "aot_unpaired", "sft")
"""No sums over pairs: they are computed over the batches that the user's batch size names."""
REFERENCE_FREE = ("simpo", "cpo")
OF_ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired", "simpo", "cpo")


# --- f-divergences: f' of the density ratio, given its logarithm ------------------------------------------------------


def _alpha(log_ratio: torch.Tensor, alpha: float) -> torch.Tensor:
    if abs(alpha - 1) < 1e-6:  # the limit
        return log_ratio
    exponent = ((alpha - 1) * log_ratio).clamp(max=80.0)  # exp stays finite in fp32
    return torch.expm1(exponent) / (alpha - 1)


F_DIVERGENCES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "reverse_kl": lambda log_ratio, _: log_ratio,
    "forward_kl": lambda log_ratio, _: 1 - torch.exp(-log_ratio),
    "js_divergence": lambda log_ratio, _: math.log(2) + logsigmoid(log_ratio),
    "alpha_divergence": _alpha,
}


# --- the objective ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceLoss:
    """A weighted sum of `LOSSES`. `ld_alpha` as in LD-DPO; `use_weighting` weighs each pair by how likely the policy
    finds it (WPO, arXiv 2406.11827, equation 2)."""

    losses: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    settings: Settings = Settings()
    ld_alpha: float | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that contradict each other or mean nothing."""
        _check(self)

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True, mean_logit=True, log_collision=self.use_weighting)

    @property
    def needs_reference(self) -> bool:
        """Not where only likelihoods are compared; `sft` alone has one to be watched against."""
        without = [name in REFERENCE_FREE for name in self.losses]
        return not any(without) or not all(
            free or name == "sft" for name, free in zip(self.losses, without, strict=True)
        )

    @property
    def is_sum(self) -> bool:
        return not any(name in WHOLE_BATCH for name in self.losses)

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        pairs = pairs_of(outputs, batch, self.ld_alpha)
        loss_P = self.per_pair(pairs)
        if self.use_weighting:
            loss_P = loss_P * _weights(outputs, batch, pairs)
        terms = {"pairs": loss_P.sum()} if self.is_sum else {"batches": loss_P.mean()}
        per_token = "simpo" in self.losses and not self.needs_reference  # what SimPO calls a reward
        return terms, watch(pairs, self.settings.beta, per_token) | watch_tokens(outputs, batch)

    def per_pair(self, pairs: Pairs) -> torch.Tensor:
        """`(P,)`."""
        plain = replace(self.settings, f_divergence="reverse_kl")
        parts = [
            weight * LOSSES[name](pairs, self.settings if name in OF_ANY_DIVERGENCE else plain)
            for name, weight in zip(self.losses, self.weights, strict=True)
        ]
        return torch.stack(parts).sum(0)


def _weights(outputs: Outputs, batch: Batch, pairs: Pairs) -> torch.Tensor:
    """`(P,)`, constant: both answers' mean probability per token, against what the policy could say at best on
    average."""
    assert batch.pairs_P2 is not None
    assert outputs.log_collision_R is not None
    aligned_S = sum_by_sequence(outputs.logp_R.detach() - outputs.log_collision_R, batch)
    mean_P2 = aligned_S[batch.pairs_P2] / torch.stack([pairs.chosen.length_P, pairs.rejected.length_P], 1).clamp(min=1)
    return mean_P2.sum(1).exp()


def _is_number(value: object) -> bool:
    """numpy's are numbers too; truth values are not meant as such."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(loss: PreferenceLoss) -> None:
    to = loss.settings
    for name in loss.losses:
        if name not in LOSSES:
            raise ConfigError(f"loss_type={name!r} is not known", hint=f"known: {', '.join(LOSSES)}")
    if len(loss.weights) != len(loss.losses):
        raise ConfigError(f"loss_weights has {len(loss.weights)} numbers for {len(loss.losses)} loss types")
    if to.beta <= 0:
        raise ConfigError(f"beta={to.beta} must be above 0", hint="0.1 is usual, 0.01 to 0.5 are tried")
    if to.f_divergence not in F_DIVERGENCES:
        hint = f"known: {', '.join(F_DIVERGENCES)}"
        raise ConfigError(f"f_divergence_type={to.f_divergence!r} is not known", hint=hint)
    if not all(_is_number(weight) and math.isfinite(weight) for weight in loss.weights):
        raise ConfigError(f"loss_weights={list(loss.weights)} are not all numbers")
    if any(weight < 0 for weight in loss.weights):
        raise ConfigError(f"loss_weights={list(loss.weights)}: one below 0 would turn its loss round",
                          hint="leave a loss out with 0")  # fmt: skip
    if not any(loss.weights):
        raise ConfigError(f"loss_weights={list(loss.weights)} leave nothing to learn", hint="give one above 0")
    if "discopop" in loss.losses and not to.discopop_tau > 0:
        raise ConfigError(f"discopop_tau={to.discopop_tau} must be above 0")
    if set(loss.losses) == {"sft"}:
        for name, value, default in (("f_divergence_type", to.f_divergence, "reverse_kl"),
                                     ("ld_alpha", loss.ld_alpha, None)):  # fmt: skip
            if value != default:
                raise ConfigError(f"{name}={value!r} is not heeded by loss_type='sft', which compares nothing")
    others = [name for name in loss.losses if name not in OF_ANY_DIVERGENCE]
    if to.f_divergence != "reverse_kl" and others:
        raise ConfigError(f"f_divergence_type={to.f_divergence!r} has no meaning for loss_type={others[0]!r}",
                          hint=f"it goes with {', '.join(OF_ANY_DIVERGENCE)}")  # fmt: skip
    if "robust" in loss.losses and not 0 <= to.label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing={to.label_smoothing} must be in [0, 0.5) with loss_type='robust'")
    if "exo_pair" in loss.losses and not 0 < to.label_smoothing < 1:
        raise ConfigError(f"label_smoothing={to.label_smoothing} must be above 0 with loss_type='exo_pair'",
                          hint="its paper uses 1e-3")  # fmt: skip
    if not 0 <= to.label_smoothing <= 1:
        raise ConfigError(f"label_smoothing={to.label_smoothing} must be in [0, 1]")
    if to.label_smoothing and not any(name in SMOOTHED for name in loss.losses):
        raise ConfigError(f"label_smoothing={to.label_smoothing} is not heeded by loss_type={list(loss.losses)}",
                          hint=f"it goes with {', '.join(SMOOTHED)}")  # fmt: skip
    if loss.use_weighting and any(name in loss.losses for name in ("aot", "aot_unpaired")):
        raise ConfigError("use_weighting weighs pairs, and AOT's losses sort them apart", hint="leave one of them out")
    if loss.ld_alpha is not None and not 0 <= loss.ld_alpha <= 1:
        raise ConfigError(f"ld_alpha={loss.ld_alpha} must be in [0, 1]")
