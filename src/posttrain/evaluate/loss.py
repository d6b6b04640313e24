"""Loss and metrics of an objective over held-out samples.

The loss is averaged as transformers averages it, so that it can be compared: the mean over evaluation batches of
`per_device_eval_batch_size` samples, each divided by its own tokens, weighted by their number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from posttrain.data.planning import plan
from posttrain.objectives.base import Objective
from posttrain.types import Batch, Needs, Outputs, Sample


@torch.no_grad()
def evaluate_loss(
    forward: Callable[[Batch, Needs], Outputs],
    objective: Objective,
    samples: Sequence[Sample],
    batch_size: int,
    token_budget: int,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """`{"loss": ..., metric: ...}`, or None if `stopped()` came true on the way."""
    total, sums, counts = 0.0, {}, {}  # type: float, dict[str, float], dict[str, int]
    for first in range(0, len(samples), batch_size):
        group = samples[first : first + batch_size]
        micro = plan(group, token_budget)
        for batch in micro:
            if stopped():
                return None
            terms, metrics = objective(forward(batch, objective.needs), batch)
            for unit, term in terms.items():
                total += float(term) / max(1, sum(part.counts[unit] for part in micro)) * len(group)
            for name, (value, count) in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
                counts[name] = counts.get(name, 0) + count
    means = {name: value / counts[name] for name, value in sums.items() if counts[name]}
    return {"loss": total / max(1, len(samples)), **means}
