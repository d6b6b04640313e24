"""Kahneman-Tversky optimisation (arXiv 2402.01306): learning from single answers that are rated good or bad.

The value of an answer is how much more the policy than the reference thinks of it, seen from a reference point: the
divergence of the two, estimated from answers behind other answers' prompts (the second branch of each sample) and held
constant. The reference point belongs to a batch, so the loss is computed over the batches that the user's batch size
names. `apo_zero_unpaired` (arXiv 2408.06266, equation 7, for single answers) needs no such point.

Shape suffixes: `R` supervised rows, `S` sequences, `P` rated answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics, Terms
from posttrain.objectives.pairs import sum_by_sequence
from posttrain.types import Batch, Needs, Outputs


def kto(reward_P: torch.Tensor, label_P: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Equations 7 and 8: `1 - sigmoid(r - z)` of a desirable answer, `1 - sigmoid(z - r)` of an undesirable one."""
    gain_P = reward_P - point
    return 1 - torch.sigmoid(torch.where(label_P, gain_P, -gain_P))


def apo_zero_unpaired(reward_P: torch.Tensor, label_P: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """APO-zero: `1 - sigmoid(r)` of a desirable answer, `sigmoid(r)` of an undesirable one."""
    return 1 - torch.sigmoid(torch.where(label_P, reward_P, -reward_P))


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LOSSES: dict[str, Loss] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}
WITH_POINT = ("kto",)
"""Losses that need mismatched answers."""


@dataclass(frozen=True)
class RatedLoss:
    """`loss_type` is a key of `LOSSES`; the weights make up for unequal numbers of good and bad answers."""

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise ConfigError(f"loss_type={self.loss_type!r} is not known", hint=f"known: {', '.join(LOSSES)}")
        if self.beta <= 0:
            raise ConfigError(f"beta={self.beta} must be above 0", hint="0.1 is usual")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")
        if not self.desirable_weight and not self.undesirable_weight:
            raise ConfigError("desirable_weight=0 and undesirable_weight=0 leave nothing to learn")

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True, mean_logit=True)

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def is_sum(self) -> bool:
        return False

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        logp_S = sum_by_sequence(outputs.logp_R, batch)
        ratio_S = logp_S - sum_by_sequence(batch.columns["ref_logp_R"], batch)
        answer_P, label_P = _answers(batch), batch.columns["label_S"][_answers(batch)]
        kl = torch.zeros_like(ratio_S[:1].sum())
        if self.loss_type in WITH_POINT:
            assert batch.pairs_P2 is not None
            kl = ratio_S[batch.pairs_P2[:, 1]].mean().detach().clamp(min=0)
        reward_P = self.beta * ratio_S[answer_P]
        loss_P = LOSSES[self.loss_type](reward_P, label_P, self.beta * kl)
        weight_P = torch.full_like(loss_P, self.undesirable_weight).masked_fill(label_P, self.desirable_weight)
        metrics = {"kl": (kl, 1), **_watch(reward_P.detach(), logp_S[answer_P].detach(), label_P, batch)}
        return {"batches": (weight_P * loss_P).mean()}, metrics | _watch_tokens(outputs, answer_P, label_P, batch)


def _answers(batch: Batch) -> torch.Tensor:
    """`(P,)`: which sequences are rated. With mismatched answers behind them, every other one."""
    if batch.pairs_P2 is not None:
        return batch.pairs_P2[:, 0]
    return torch.arange(batch.num_sequences, device=batch.sequence_R.device)


SIDES = (("chosen", "desirable"), ("rejected", "undesirable"))
"""The metric's name, and the count's."""


def _watch(reward_P: torch.Tensor, logp_P: torch.Tensor, label_P: torch.Tensor, batch: Batch) -> Metrics:
    metrics: Metrics = {}
    means = []
    for side, rated in SIDES:
        is_one_P, count = label_P if side == "chosen" else ~label_P, batch.counts[rated]
        if count:
            total = (reward_P * is_one_P).sum()
            metrics[f"rewards/{side}"] = (total, count)
            metrics[f"logps/{side}"] = ((logp_P * is_one_P).sum(), count)
            means.append(total / count)
    if len(means) == 2:
        metrics["rewards/margins"] = (means[0] - means[1], 1)
    return metrics


def _watch_tokens(outputs: Outputs, answer_P: torch.Tensor, label_P: torch.Tensor, batch: Batch) -> Metrics:
    assert outputs.entropy_R is not None
    assert outputs.mean_logit_R is not None
    tokens = {side: batch.counts[f"{rated}_tokens"] for side, rated in SIDES}
    entropy_P, logit_P = (sum_by_sequence(x, batch)[answer_P] for x in (outputs.entropy_R, outputs.mean_logit_R))
    metrics: Metrics = {"entropy": (entropy_P.sum(), sum(tokens.values()))}
    for side, _ in SIDES:
        if tokens[side]:
            is_one_P = label_P if side == "chosen" else ~label_P
            metrics[f"logits/{side}"] = ((logit_P * is_one_P).sum(), tokens[side])
    return metrics
