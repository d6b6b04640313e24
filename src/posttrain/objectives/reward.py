"""Reward modelling: the chosen answer's score above the rejected one's (Bradley-Terry; arXiv 2203.02155, equation 1).

`-log sigmoid(chosen - rejected - margin)`, with a margin where rows have one (arXiv 2307.09288, equation 2), and on
request a pull of both scores' sum towards zero (arXiv 2312.09244, equation 2).

Shape suffixes: `S` sequences, `P` pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics, Terms
from posttrain.types import Batch, Needs, Outputs


@dataclass(frozen=True)
class RewardLoss:
    """`centering` weighs the pull towards zero; 0.01 is usual."""

    centering: float | None = None

    def __post_init__(self) -> None:
        if self.centering is not None and self.centering < 0:
            raise ConfigError(f"center_rewards_coefficient={self.centering} must be at least 0")

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def is_sum(self) -> bool:
        return True

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        assert outputs.score_S is not None
        assert batch.pairs_P2 is not None
        chosen_P, rejected_P = outputs.score_S[batch.pairs_P2].unbind(1)
        loss_P = -logsigmoid(chosen_P - rejected_P - batch.columns.get("margin_P", 0.0))
        if self.centering is not None:
            loss_P = loss_P + self.centering * (chosen_P + rejected_P).square()
        return {"pairs": loss_P.sum()}, watch(chosen_P.detach(), rejected_P.detach())


def watch(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> Metrics:
    """Least and greatest are those of the batch; the meter takes those of a step."""
    count = len(chosen_P)
    scores = torch.stack([chosen_P, rejected_P])
    return {
        "accuracy": ((chosen_P > rejected_P).sum(), count),
        "margin": ((chosen_P - rejected_P).sum(), count),
        "mean_reward": (scores.sum(), 2 * count),
        "min_reward": (scores.amin(), 1),
        "max_reward": (scores.amax(), 1),
    }
