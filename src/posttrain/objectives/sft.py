"""Supervised fine-tuning: maximise the likelihood of the supervised tokens.

`nll` is the mean negative log-likelihood per supervised token; with label smoothing e it is
`(1 - e) nll - e mean_v log p(v)` (arXiv 1512.00567, section 7, as transformers computes it). `dft` weighs each token's
loss by its own probability, held constant (Dynamic Fine-Tuning, arXiv 2508.05629, equation 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.objectives.base import Metrics, Terms
from posttrain.types import Batch, Needs, Outputs


@dataclass(frozen=True)
class SupervisedLoss:
    """`loss_type` is a key of `LOSSES`; label smoothing belongs to `nll` alone."""

    loss_type: str = "nll"
    label_smoothing: float = 0.0
    needs_reference = False
    is_sum = True

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True, uniform_logp=self.label_smoothing > 0)

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
        tokens = batch.counts["tokens"]
        metrics: Metrics = {"mean_token_accuracy": (outputs.is_top1_R.sum(), tokens)}
        if outputs.entropy_R is not None:
            metrics["entropy"] = (outputs.entropy_R.sum(), tokens)
        return {"tokens": self.per_token(outputs).sum()}, metrics

    def per_token(self, outputs: Outputs) -> torch.Tensor:
        """Loss of each supervised row, `(R,)`."""
        loss_R = LOSSES[self.loss_type](outputs.logp_R)
        if self.label_smoothing:
            assert outputs.uniform_logp_R is not None
            loss_R = (1 - self.label_smoothing) * loss_R - self.label_smoothing * outputs.uniform_logp_R
        return loss_R


def nll(logp_R: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood."""
    return -logp_R


def dft(logp_R: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood times the (constant) probability."""
    return -logp_R * logp_R.exp().detach()


LOSSES = {"nll": nll, "dft": dft}
