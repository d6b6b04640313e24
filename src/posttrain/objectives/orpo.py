"""Odds-ratio preference optimisation (arXiv 2403.07691): supervised training on the chosen answer and, in the same
step, a push of its odds above the rejected one's. No reference.

`loss = nll - beta log sigmoid(log odds(chosen) / odds(rejected))`, where an answer's probability is its geometric mean
per token (equations 4 to 7; beta is the paper's lambda). As in its authors' code and in TRL, `nll` is per token of
prompt and chosen answer together.

Shape suffixes: `R` supervised rows, `P` pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics, Terms
from posttrain.objectives.pairs import pairs_of, watch_tokens
from posttrain.types import Batch, Needs, Outputs


@dataclass(frozen=True)
class OddsRatioLoss:
    """`beta` weighs the odds ratio against the supervised loss."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta={self.beta} must be above 0", hint="0.1 is usual")

    @property
    def needs(self) -> Needs:
        return Needs(mean_logit=True, prompts=True)

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def is_sum(self) -> bool:
        return True

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        """`batch` is packed with `prompts`: what is no rejected answer is a prompt or a chosen one."""
        pairs = pairs_of(outputs, batch)
        chosen_P, rejected_P = (side.logp_P / side.length_P.clamp(min=1) for side in (pairs.chosen, pairs.rejected))
        log_odds_P = chosen_P - rejected_P - (log1mexp(chosen_P) - log1mexp(rejected_P))
        ratio_P = logsigmoid(log_odds_P)
        nll = pairs.rejected.logp_P.sum() - outputs.logp_R.sum()
        count = len(ratio_P)
        metrics: Metrics = {
            "nll_loss": (nll, batch.counts["nll_tokens"]),
            "log_odds_ratio": (ratio_P.sum(), count),
            "log_odds_chosen": (log_odds_P.sum(), count),
            "logps/chosen": (chosen_P.sum(), count),
            "logps/rejected": (rejected_P.sum(), count),
            "rewards/chosen": (self.beta * chosen_P.sum(), count),
            "rewards/rejected": (self.beta * rejected_P.sum(), count),
            "rewards/accuracies": ((chosen_P > rejected_P).sum(), count),
            "rewards/margins": (self.beta * (chosen_P - rejected_P).sum(), count),
        }
        return {"nll_tokens": nll, "pairs": -self.beta * ratio_P.sum()}, metrics | watch_tokens(outputs, batch)


def log1mexp(log_p: torch.Tensor) -> torch.Tensor:
    """`log(1 - p)` given `log p < 0`, accurate at both ends (Maechler 2012)."""
    near_one = log_p > -math.log(2)
    return torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p))),
    )
