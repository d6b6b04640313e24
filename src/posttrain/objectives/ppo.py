"""Proximal policy optimisation (arXiv 1707.06347) with a value function, clipped as in arXiv 2005.12729.

With `ratio = exp(log policy - log old policy)` of a token, its advantage A, and the return R that its value V learns:

    policy   max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange))
    value    max((V - R)^2, (clip(V, old V - cliprange_value, old V + cliprange_value) - R)^2) / 2

The loss is the mean over the tokens of the step of `policy + vf_coef value`. The KL penalty is part of the rewards that
advantages and returns are made of (rollout/credit.py). A batch brings `advantage_R`, `return_R`, `old_logp_R` and
`old_value_R`.

Shape suffixes: `R` supervised rows (tokens of completions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics, Terms
from posttrain.objectives.correction import difference
from posttrain.types import Batch, Needs, Outputs


@dataclass(frozen=True)
class PPOLoss:
    """`beta` weighs the KL divergence that the rewards were reduced by."""

    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    beta: float = 0.05

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that mean nothing."""
        for name in ("cliprange", "cliprange_value", "vf_coef"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True, value=True)

    @property
    def needs_reference(self) -> bool:
        return self.beta != 0.0

    @property
    def is_sum(self) -> bool:
        return True

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        assert outputs.value_R is not None
        columns, value_R = batch.columns, outputs.value_R
        moved_R = outputs.logp_R - columns["old_logp_R"]
        ratio_R = moved_R.exp()
        free_R = -columns["advantage_R"] * ratio_R
        held_R = -columns["advantage_R"] * ratio_R.clamp(1 - self.cliprange, 1 + self.cliprange)
        policy_R = torch.max(free_R, held_R)
        old_R, c = columns["old_value_R"], self.cliprange_value
        error_R = (value_R - columns["return_R"]).square()
        held_error_R = (value_R.clamp(old_R - c, old_R + c) - columns["return_R"]).square()
        loss_R = 0.5 * torch.max(error_R, held_error_R)
        watched = {
            "loss/policy_avg": policy_R,
            "loss/value_avg": loss_R,
            "policy/approxkl_avg": 0.5 * moved_R.square(),
            "policy/clipfrac_avg": held_R > free_R,
            "val/clipfrac_avg": held_error_R > error_R,
            "val/ratio": ratio_R,
        }
        if outputs.entropy_R is not None:
            watched |= {"entropy": outputs.entropy_R, "policy/entropy_avg": outputs.entropy_R}
        metrics: Metrics = {name: (one_R.detach().sum(), len(ratio_R)) for name, one_R in watched.items()}
        return {"tokens": (policy_R + self.vf_coef * loss_R).sum()}, metrics | difference(columns["old_logp_R"], batch)
