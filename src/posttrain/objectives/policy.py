"""Policy gradients on sampled completions: GRPO (arXiv 2402.03300) and its variants, and RLOO (arXiv 2402.14740).

Each token of a completion has the advantage of its sequence; what differs is how far the policy may move from the one
that sampled it (clipping, soft gates, weights without gradient), and what the sum is divided by. With
`ratio = policy / old policy` of a token (or of a whole sequence, GSPO, arXiv 2507.18071):

    grpo, bnpo, dr_grpo, dapo, luspo   -min(ratio A, clip(ratio) A)             divided as `AVERAGES` says
    cispo (arXiv 2506.13585)           -stop(min(ratio, epsilon_high)) A log p
    sapo (arXiv 2511.20347)            -4 / tau sigmoid(tau (ratio - 1)) A
    vespo (arXiv 2602.10693)           -stop(phi(ratio of the sequence)) A log p

A batch brings `advantage_S`; `old_logp_R` where the policy has moved since it sampled (else they are its own, and the
ratio is 1 with a gradient); `ref_logp_R` where `beta` is not 0; a number `round_weight` where batches of several rounds
of sampling meet in a step.

Shape suffixes: `R` supervised rows (tokens of completions), `S` sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics, Terms
from posttrain.objectives.correction import Correction, difference
from posttrain.objectives.pairs import lengths, sum_by_sequence
from posttrain.types import Batch, Needs, Outputs


@dataclass(frozen=True)
class Settings:
    """`epsilon` and `epsilon_high` bound the ratio from below and above, `delta` the unclipped side (INTELLECT-2, arXiv
    2505.07291); the others belong to the loss that they are named after."""

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0


@dataclass(frozen=True)
class Rows:
    """What a token's loss depends on, all `(R,)`: its log-probability now, the ratio to the policy that sampled it (the
    token's or its sequence's), and the advantage. `log_ratio_S` sums each sequence's log-ratios."""

    logp_R: torch.Tensor
    ratio_R: torch.Tensor
    advantage_R: torch.Tensor
    log_ratio_S: torch.Tensor
    sequence_R: torch.Tensor


def clipped(rows: Rows, to: Settings) -> torch.Tensor:
    """PPO's surrogate (arXiv 1707.06347, equation 7); `delta` also bounds what clipping leaves unbounded."""
    ratio_R = rows.ratio_R if to.delta is None else rows.ratio_R.clamp(max=to.delta)
    bounded_R = rows.ratio_R.clamp(1 - to.epsilon, 1 + to.epsilon_high)
    return -torch.min(ratio_R * rows.advantage_R, bounded_R * rows.advantage_R)


def cispo(rows: Rows, to: Settings) -> torch.Tensor:
    """CISPO (MiniMax-M1, equation 4): every token keeps its gradient, its weight is bounded. Here `epsilon_high` is the
    bound itself."""
    return -rows.ratio_R.detach().clamp(max=to.epsilon_high) * rows.advantage_R * rows.logp_R


def sapo(rows: Rows, to: Settings) -> torch.Tensor:
    """SAPO (equation 5): a sigmoid gate in the place of the clip, cooler for bad completions."""
    tau_R = _either(rows.advantage_R > 0, to.sapo_temperature_pos, to.sapo_temperature_neg, rows.logp_R)
    return -torch.sigmoid(tau_R * (rows.ratio_R - 1)) * 4 / tau_R * rows.advantage_R


def vespo(rows: Rows, to: Settings) -> torch.Tensor:
    """VESPO: every token keeps its gradient, its sequence has a soft weight."""
    return -vespo_weight(rows, to) * rows.advantage_R * rows.logp_R


def vespo_weight(rows: Rows, to: Settings) -> torch.Tensor:
    """`phi(w) = w^k e^(lambda (1 - w))` of each row's sequence, whose ratio is w; 1 at w = 1."""
    log_w_R = rows.log_ratio_S.detach().clamp(LEAST_LOG_RATIO, MOST_LOG_RATIO)[rows.sequence_R]
    good_R = rows.advantage_R >= 0
    k_R = _either(good_R, to.vespo_k_pos, to.vespo_k_neg, log_w_R)
    lambda_R = _either(good_R, to.vespo_lambda_pos, to.vespo_lambda_neg, log_w_R).clamp(min=1e-4)
    return torch.exp(lambda_R + k_R * log_w_R - lambda_R * log_w_R.exp()).nan_to_num(0.0, 0.0, 0.0)


def _either(is_first_R: torch.Tensor, first: float, other: float, like_R: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like_R, other).masked_fill(is_first_R, first)


LEAST_LOG_RATIO, MOST_LOG_RATIO = -18.420680743952367, 20.0
"""log 1e-8, and what keeps exp finite in fp32."""

Loss = Callable[[Rows, Settings], torch.Tensor]
LOSSES: dict[str, Loss] = {
    "grpo": clipped, "bnpo": clipped, "dr_grpo": clipped, "dapo": clipped, "luspo": clipped,
    "cispo": cispo, "sapo": sapo, "vespo": vespo,
}  # fmt: skip
AVERAGES = {
    "grpo": "sequence means", "sapo": "sequence means", "bnpo": "batch tokens", "dr_grpo": "longest",
    "dapo": "tokens", "cispo": "tokens", "vespo": "tokens", "luspo": "sequence sums",
}  # fmt: skip
"""How tokens become a loss: the mean over sequences of their tokens' means; the mean over the tokens of each batch of
the user's size; the sum over sequences times the longest completion allowed (Dr. GRPO, arXiv 2503.20783); the mean over
all tokens of the step (DAPO, arXiv 2503.14476); the mean over sequences of their sums (LUSPO, arXiv 2602.05261)."""
ACTING = "entropy/acting"
"""Metric: the entropy of the tokens that a bonus acts on."""
CLIPS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass(frozen=True)
class PolicyLoss:
    """`loss_type` is a key of `LOSSES`; `level` says whether ratios are of tokens or of sequences; `beta` weighs the KL
    divergence to the reference, estimated per token (k3, http://joschu.net/blog/kl-approx.html), with `corrected_kl`
    times the ratio; `max_completion_length` is Dr. GRPO's divisor. `top_entropy` keeps the gradient of that share of
    each batch's tokens, the most uncertain ones (arXiv 2506.01939); `entropy_coef` weighs a bonus, the mean entropy of
    the tokens of each batch of the user's size (of those that have the gradient); with `adaptive_entropy` it changes
    from step to step, and may be 0 for now. `correction` is for samplers that are not quite the policy."""

    loss_type: str = "dapo"
    level: str = "token"
    beta: float = 0.0
    settings: Settings = Settings()
    max_completion_length: int = 256
    corrected_kl: bool = False
    top_entropy: float = 1.0
    entropy_coef: float = 0.0
    adaptive_entropy: bool = False
    off_policy_threshold: float | None = None
    correction: Correction | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that mean nothing."""
        _check(self)

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True, entropy_gradient=self.entropy_coef != 0)

    @property
    def has_bonus(self) -> bool:
        return self.entropy_coef != 0 or self.adaptive_entropy

    @property
    def needs_reference(self) -> bool:
        return self.beta != 0.0

    @property
    def is_sum(self) -> bool:
        """Batches are whole where a mean or a quantile is taken over their tokens."""
        return AVERAGES[self.loss_type] != "batch tokens" and self.top_entropy >= 1.0 and not self.has_bonus

    @property
    def skips_indifferent(self) -> bool:
        """Whether completions without an advantage add nothing to the gradient, and need not be computed."""
        return not self.beta and self.top_entropy >= 1.0 and not self.has_bonus

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        old_R = batch.columns.get("old_logp_R", outputs.logp_R.detach())
        rows, length_S = self.rows(outputs.logp_R, old_R, batch), lengths(batch, outputs.logp_R)
        loss_R = LOSSES[self.loss_type](rows, self.settings)
        if self.off_policy_threshold is not None:
            loss_R = loss_R * self._on_policy(rows, length_S, batch)
        acting_R = torch.ones_like(loss_R)
        if self.top_entropy < 1.0:
            assert outputs.entropy_R is not None
            acting_R = _most_uncertain(outputs.entropy_R, self.top_entropy)
            loss_R = loss_R * acting_R
        metrics = self._watch(outputs, rows, length_S, batch)
        if self.correction is not None:
            weight_R, noted = self.correction(old_R, batch)
            loss_R, metrics = loss_R * weight_R, metrics | noted
        metrics |= difference(old_R, batch)
        if self.beta:
            kl_R = kl_divergence(outputs.logp_R, batch.columns["ref_logp_R"])
            if self.corrected_kl:
                kl_R = kl_R * rows.ratio_R
            loss_R = loss_R + self.beta * kl_R
            metrics["kl"] = (kl_R.detach().sum(), len(kl_R))
        terms = self._averaged(loss_R, length_S, batch)
        if self.has_bonus:
            terms, noted = self._with_bonus(terms, outputs.entropy_R, acting_R, batch)
            metrics |= noted
        return terms, metrics

    def _with_bonus(
        self, terms: Terms, entropy_R: torch.Tensor | None, acting_R: torch.Tensor, batch: Batch
    ) -> tuple[Terms, Metrics]:
        assert entropy_R is not None
        ((unit, term),) = terms.items()
        total, count = (entropy_R * acting_R).sum(), acting_R.sum()
        metrics: Metrics = {"policy_loss": (term.detach(), batch.counts[unit])}  # the loss without the bonus
        if self.adaptive_entropy:
            metrics[ACTING] = (total.detach(), count)
        else:
            metrics["entropy_coef"] = (torch.tensor(self.entropy_coef), 1)
        if self.entropy_coef:
            terms = {**terms, "batches": terms.get("batches", 0.0) - self.entropy_coef * total / count.clamp(min=1)}
        return terms, metrics

    def rows(self, logp_R: torch.Tensor, old_logp_R: torch.Tensor, batch: Batch) -> Rows:
        log_ratio_R = logp_R - old_logp_R
        bounded_R = log_ratio_R.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO) if self.loss_type == "vespo" else log_ratio_R
        log_ratio_S = sum_by_sequence(bounded_R, batch)
        if self.level == "sequence":
            mean_S = sum_by_sequence(log_ratio_R, batch) / lengths(batch, logp_R).clamp(min=1)
            log_ratio_R = mean_S[batch.sequence_R]
        advantage_R = batch.columns["advantage_S"].to(logp_R.dtype)[batch.sequence_R]
        return Rows(logp_R, log_ratio_R.exp(), advantage_R, log_ratio_S, batch.sequence_R)

    def _on_policy(self, rows: Rows, length_S: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`(R,)`: 0 for bad completions that the policy has left behind by more than the threshold, as the mean of
        log old / policy (DeepSeek-V3.2, equation 9); where the sampler's own numbers are there, of those, so that what
        it does otherwise than training counts too."""
        assert self.off_policy_threshold is not None
        log_ratio_S = rows.log_ratio_S.detach()
        if "sampled_logp_R" in batch.columns:
            gap_R = rows.logp_R.detach() - batch.columns["sampled_logp_R"]
            log_ratio_S = sum_by_sequence(gap_R.nan_to_num(nan=0.0), batch)  # what it has not said counts as agreed
        gone_S = -log_ratio_S / length_S.clamp(min=1)
        return ((rows.advantage_R >= 0) | (gone_S <= self.off_policy_threshold)[rows.sequence_R]).to(rows.logp_R.dtype)

    def _averaged(self, loss_R: torch.Tensor, length_S: torch.Tensor, batch: Batch) -> Terms:
        how = AVERAGES[self.loss_type]
        if how == "batch tokens":
            return {"batches": loss_R.sum() / max(1, batch.counts["batch_tokens"])}
        if how == "sequence means":
            return {"sequences": (sum_by_sequence(loss_R, batch) / length_S.clamp(min=1)).sum()}
        if how == "longest":
            return {"sequences": loss_R.sum() / self.max_completion_length}
        if how == "tokens":
            return {"tokens": loss_R.sum() * batch.columns.get("round_weight", 1.0)}
        return {"sequences": loss_R.sum()}

    def _watch(self, outputs: Outputs, rows: Rows, length_S: torch.Tensor, batch: Batch) -> Metrics:
        """What is not computed, for it teaches nothing, is never clipped, and counts in shares of what is; means are of
        what was computed."""
        assert outputs.entropy_R is not None
        metrics: Metrics = {"entropy": (outputs.entropy_R.detach().sum(), len(outputs.logp_R))}
        with torch.no_grad():
            ratio_R, advantage_R, to = rows.ratio_R, rows.advantage_R, self.settings
            if self.loss_type in CLIPS:
                low_R = (ratio_R < 1 - to.epsilon) & (advantage_R < 0)
                high_R = (ratio_R > 1 + to.epsilon_high) & (advantage_R > 0)
                low_S, high_S = (_means(one_R, length_S, batch) for one_R in (low_R, high_R))
                metrics["clip_ratio/low_mean"] = self._share(low_R, low_S, batch)
                metrics["clip_ratio/high_mean"] = self._share(high_R, high_S, batch)
                metrics["clip_ratio/region_mean"] = self._share(low_R | high_R, low_S + high_S, batch)
                metrics["clip_ratio/low_min"] = (low_S.amin() * (not batch.counts.get("left_out")), 1)
                metrics["clip_ratio/high_max"] = (high_S.amax(), 1)
            elif self.loss_type == "cispo":
                clipped_R = (ratio_R > to.epsilon_high) & (advantage_R > 0)
                metrics["cispo_clip_ratio"] = self._share(clipped_R, _means(clipped_R, length_S, batch), batch)
            elif self.loss_type == "vespo":
                phi_S = _means(vespo_weight(rows, to), length_S, batch)
                metrics["vespo/phi_seq_mean"] = (phi_S.sum(), len(phi_S))
        return metrics

    def _share(self, is_R: torch.Tensor, mean_S: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """Of all tokens, or of all sequences where those have one ratio each."""
        if self.level == "sequence":
            return mean_S.sum(), batch.counts.get("sequences", len(mean_S))
        return is_R.sum(), batch.counts.get("all_tokens", len(is_R))


def _means(value_R: torch.Tensor, length_S: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`(S,)`: the mean over each sequence's tokens."""
    return sum_by_sequence(value_R.to(length_S.dtype), batch) / length_S.clamp(min=1)


def kl_divergence(logp_R: torch.Tensor, ref_logp_R: torch.Tensor) -> torch.Tensor:
    """k3: `e^x - x - 1` with `x = log reference / policy`, unbiased and never negative."""
    gap_R = ref_logp_R - logp_R
    return gap_R.exp() - gap_R - 1


def _most_uncertain(entropy_R: torch.Tensor, share: float) -> torch.Tensor:
    """1 for the `share` of the rows that have the highest entropy."""
    if not len(entropy_R):
        return entropy_R
    return (entropy_R >= torch.quantile(entropy_R.float(), 1 - share)).to(entropy_R.dtype)


def _check(loss: PolicyLoss) -> None:
    to = loss.settings
    if loss.loss_type not in LOSSES:
        raise ConfigError(f"loss_type={loss.loss_type!r} is not known", hint=f"known: {', '.join(LOSSES)}")
    if loss.level not in ("token", "sequence"):
        raise ConfigError(f"importance_sampling_level={loss.level!r} must be 'token' or 'sequence'")
    if loss.beta < 0:
        raise ConfigError(f"beta={loss.beta} must be at least 0")
    if not 0 < loss.top_entropy <= 1:
        raise ConfigError(f"top_entropy_quantile={loss.top_entropy} must be above 0 and at most 1")
    if loss.correction is not None and loss.loss_type == "vespo":
        raise ConfigError("vllm_importance_sampling_correction=True is not honoured with loss_type='vespo'",
                          hint="set it to False, or choose another loss_type")  # fmt: skip
    if to.epsilon < 0 or to.epsilon_high < 0:
        raise ConfigError(f"epsilon={to.epsilon}, epsilon_high={to.epsilon_high} must be at least 0")
    for name in ("sapo_temperature_neg", "sapo_temperature_pos"):
        if not getattr(to, name) > 0:
            raise ConfigError(f"{name}={getattr(to, name)} must be above 0")
    if to.delta is not None and to.delta <= 1 + to.epsilon:
        raise ConfigError(f"delta={to.delta} must be above 1 + epsilon ({1 + to.epsilon})")
    if to.delta is not None and LOSSES[loss.loss_type] is not clipped:
        clipping = ", ".join(name for name, of in LOSSES.items() if of is clipped)
        raise ConfigError(f"delta={to.delta} is not honoured with loss_type={loss.loss_type!r}, which does not clip",
                          hint=f"leave it out, or choose one of {clipping}")  # fmt: skip
