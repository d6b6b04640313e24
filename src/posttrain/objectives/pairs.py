"""What every loss over pairs begins with: sums of log-probabilities a sequence, chosen and rejected side by side, and
the figures that people watch.

Shape suffixes: `R` supervised rows, `S` sequences, `P` pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.objectives.base import Metrics
from posttrain.types import Batch, Outputs


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected answers of all pairs: `logp_P` and `ref_logp_P` summed over the answer's tokens (the
    reference's are 0 where there is none), `length_P` their number; `plain_logp_P` is summed without LD-DPO's
    weights."""

    logp_P: torch.Tensor
    ref_logp_P: torch.Tensor
    length_P: torch.Tensor
    plain_logp_P: torch.Tensor

    @property
    def log_ratio_P(self) -> torch.Tensor:
        """log of policy over reference."""
        return self.logp_P - self.ref_logp_P

    def per_token(self) -> Side:
        """Means in the place of sums."""
        length_P = self.length_P.clamp(min=1)
        sums = (self.logp_P, self.ref_logp_P, self.length_P, self.plain_logp_P)
        return Side(*(value_P / length_P for value_P in sums))


@dataclass(frozen=True)
class Pairs:
    chosen: Side
    rejected: Side


def sum_by_sequence(value_R: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`(S,)`: the sum over each sequence's supervised tokens."""
    return value_R.new_zeros(batch.num_sequences).index_add(0, batch.sequence_R, value_R)


def lengths(batch: Batch, like: torch.Tensor) -> torch.Tensor:
    """`(S,)`: how many supervised tokens each sequence has."""
    return sum_by_sequence(torch.ones_like(batch.sequence_R, dtype=like.dtype), batch)


def pairs_of(outputs: Outputs, batch: Batch, ld_alpha: float | None = None) -> Pairs:
    """Both sides of every pair. With `ld_alpha`, tokens beyond the length of the shorter answer weigh so much (LD-DPO,
    arXiv 2409.06411, equation 10)."""
    assert batch.pairs_P2 is not None
    length_S = lengths(batch, outputs.logp_R)
    weight_R = None if ld_alpha is None else _weights_beyond(length_S, batch, ld_alpha)
    ref_logp_R = batch.columns.get("ref_logp_R")
    logp_S, ref_logp_S = (
        torch.zeros_like(length_S)
        if value_R is None
        else sum_by_sequence(value_R if weight_R is None else value_R * weight_R, batch)
        for value_R in (outputs.logp_R, ref_logp_R)
    )
    plain_S = logp_S if weight_R is None else sum_by_sequence(outputs.logp_R, batch)
    values = (logp_S, ref_logp_S, length_S, plain_S)
    return Pairs(*(Side(*(value_S[at_P] for value_S in values)) for at_P in batch.pairs_P2.unbind(1)))


def _weights_beyond(length_S: torch.Tensor, batch: Batch, alpha: float) -> torch.Tensor:
    """`(R,)`: 1 for each answer's first tokens, as many as the shorter one of its pair has, `alpha` for the rest."""
    assert batch.pairs_P2 is not None
    shorter_P = length_S[batch.pairs_P2].amin(1)
    shorter_S = length_S.clone()
    shorter_S[batch.pairs_P2] = shorter_P[:, None].expand(-1, 2)
    number_R = torch.arange(len(batch.sequence_R), device=length_S.device)
    first_S = number_R.new_full((batch.num_sequences,), len(number_R))
    first_S.scatter_reduce_(0, batch.sequence_R, number_R, "amin")
    place_R = number_R - first_S[batch.sequence_R]
    return torch.full_like(place_R, alpha, dtype=length_S.dtype).masked_fill(place_R < shorter_S[batch.sequence_R], 1.0)


def watch(pairs: Pairs, beta: float, per_token: bool = False) -> Metrics:
    """Rewards (beta times the log-ratio to the reference) and summed log-probabilities, as everybody names them; or
    `per_token`, means over each answer's tokens."""
    count = len(pairs.chosen.logp_P)
    if per_token:
        pairs = Pairs(pairs.chosen.per_token(), pairs.rejected.per_token())
    with torch.no_grad():
        chosen_P, rejected_P = (beta * side.log_ratio_P for side in (pairs.chosen, pairs.rejected))
        return {
            "rewards/chosen": (chosen_P.sum(), count),
            "rewards/rejected": (rejected_P.sum(), count),
            "rewards/accuracies": ((chosen_P > rejected_P).sum(), count),
            "rewards/margins": ((chosen_P - rejected_P).sum(), count),
            "logps/chosen": (pairs.chosen.logp_P.detach().sum(), count),
            "logps/rejected": (pairs.rejected.logp_P.detach().sum(), count),
        }


def watch_tokens(outputs: Outputs, batch: Batch) -> Metrics:
    """Entropy over all answers, mean logits of each side, and how often the chosen token was the likeliest."""
    assert batch.pairs_P2 is not None
    metrics: Metrics = {}
    if outputs.entropy_R is not None:
        metrics["entropy"] = (outputs.entropy_R.sum(), batch.counts["tokens"])
    top1_S = sum_by_sequence(outputs.is_top1_R.to(outputs.logp_R.dtype), batch)
    for name, at_P in zip(("chosen", "rejected"), batch.pairs_P2.unbind(1), strict=True):
        tokens = int(batch.counts[f"{name}_tokens"])
        if outputs.mean_logit_R is not None:
            metrics[f"logits/{name}"] = (sum_by_sequence(outputs.mean_logit_R, batch)[at_P].sum(), tokens)
        if name == "chosen":
            metrics["mean_token_accuracy"] = (top1_S[at_P].sum(), tokens)
    return metrics
