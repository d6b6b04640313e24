"""What is made of a sampler that is not quite the policy: another engine, other kernels, another precision.

The ratio of the policy (as it was when the round began) to the sampler weighs each token's loss, bounded so that a few
tokens do not outweigh all others (truncated importance sampling, https://fengyao.notion.site/off-policy-rl), or taken
out of the loss where it lies beyond the bounds (masked importance sampling).

Shape suffixes: `R` supervised rows, `S` sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics
from posttrain.objectives.pairs import sum_by_sequence
from posttrain.types import Batch

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def difference(old_logp_R: torch.Tensor, batch: Batch) -> Metrics:
    """How far the sampler's log-probabilities lie from the policy's, over the tokens of which it has said any."""
    if "sampled_logp_R" not in batch.columns:
        return {}
    gap_R = (old_logp_R.detach() - batch.columns["sampled_logp_R"]).abs()
    known_R = gap_R.isfinite()
    return {"sampling/logp_difference": (gap_R.where(known_R, 0.0).sum(), known_R.sum())}


@dataclass(frozen=True)
class Correction:
    """Ratios of tokens, or of whole sequences, that lie outside `least` to `most` are brought there (`truncate`) or
    made 0 (`mask`). None: no bound."""

    mode: str = "sequence_mask"
    least: float | None = None
    most: float | None = 3.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"vllm_importance_sampling_mode={self.mode!r} is unknown", hint=f"known: {MODES}")
        if self.least is not None and self.most is not None and self.least >= self.most:
            raise ConfigError(f"vllm_importance_sampling_clip_min={self.least} must be below "
                              f"vllm_importance_sampling_clip_max={self.most}")  # fmt: skip
        if self.mode.endswith("truncate") and self.least is None and self.most is None:
            raise ConfigError(f"vllm_importance_sampling_mode={self.mode!r} truncates to no bound",
                              hint="set vllm_importance_sampling_clip_max")  # fmt: skip

    def __call__(self, old_logp_R: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """The weight of each row. What the sampler has not said (NaN) is not corrected. Raises ConfigError where it has
        said nothing at all."""
        if "sampled_logp_R" not in batch.columns:
            raise ConfigError("vllm_importance_sampling_correction=True weighs by what the sampler said of its tokens, "
                              "and rollout_func gave no logprobs",
                              hint="give them, or set vllm_importance_sampling_correction=False")  # fmt: skip
        gap_R = (old_logp_R - batch.columns["sampled_logp_R"]).detach().nan_to_num(nan=0.0)
        is_whole = self.mode.startswith("sequence")
        ratio = (sum_by_sequence(gap_R, batch) if is_whole else gap_R).exp()
        low, high = -math.inf if self.least is None else self.least, math.inf if self.most is None else self.most
        if self.mode.endswith("truncate"):
            ratio = ratio.clamp(low, high)
        else:
            ratio = ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
        metrics: Metrics = {
            "sampling/importance_sampling_ratio/mean": (ratio.sum(), len(ratio)),
            "sampling/importance_sampling_ratio/min": (ratio.min(), 1),
            "sampling/importance_sampling_ratio/max": (ratio.max(), 1),
            "sampling/sampling_logp_difference/mean": (gap_R.abs().sum(), len(gap_R)),
            "sampling/sampling_logp_difference/max": (gap_R.abs().max(), 1),
        }
        return (ratio[batch.sequence_R] if is_whole else ratio), metrics
