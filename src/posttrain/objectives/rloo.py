"""REINFORCE leave-one-out (arXiv 2402.14740): a completion is one action, worth its reward less that of its siblings.

With `ratio = exp(log policy - log old policy)` of a whole completion the loss is `-min(ratio A, clip(ratio) A)`,
averaged over completions; while the policy is the one that sampled, its gradient is that of REINFORCE. The KL penalty
is part of the reward (`kl_penalty`), so it is in `advantage_S` already.

Shape suffixes: `R` supervised rows (tokens of completions), `S` sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics, Terms
from posttrain.objectives.correction import difference
from posttrain.objectives.pairs import sum_by_sequence
from posttrain.types import Batch, Needs, Outputs


@dataclass(frozen=True)
class LeaveOneOutLoss:
    """`beta` weighs the KL divergence that the rewards were reduced by."""

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.05

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.epsilon_high < 0:
            raise ConfigError(f"epsilon={self.epsilon}, epsilon_high={self.epsilon_high} must be at least 0")

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True)

    @property
    def needs_reference(self) -> bool:
        return self.beta != 0.0

    @property
    def is_sum(self) -> bool:
        return True

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        assert outputs.entropy_R is not None
        old_R = batch.columns.get("old_logp_R", outputs.logp_R.detach())
        ratio_S = sum_by_sequence(outputs.logp_R - old_R, batch).exp()
        advantage_S = batch.columns["advantage_S"].to(ratio_S.dtype)
        bounded_S = ratio_S.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        loss_S = -torch.min(ratio_S * advantage_S, bounded_S * advantage_S)
        metrics: Metrics = {"entropy": (outputs.entropy_R.sum(), len(outputs.entropy_R))}
        with torch.no_grad():
            low_S = (ratio_S < 1 - self.epsilon) & (advantage_S < 0)
            high_S = (ratio_S > 1 + self.epsilon_high) & (advantage_S > 0)
            for name, clipped_S in (("low", low_S), ("high", high_S), ("region", low_S | high_S)):
                metrics[f"clip_ratio/{name}_mean"] = (clipped_S.sum(), batch.counts.get("sequences", len(clipped_S)))
            metrics["clip_ratio/low_min"] = (low_S.float().amin() * (not batch.counts.get("left_out")), 1)
            metrics["clip_ratio/high_max"] = (high_S.float().amax(), 1)
        return {"sequences": loss_S.sum()}, metrics | difference(old_R, batch)
