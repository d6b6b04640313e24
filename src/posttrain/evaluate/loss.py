"""Loss and metrics of an objective over held-out samples.

All are averaged as transformers and TRL average them, so that they can be compared: over evaluation batches of
`per_device_eval_batch_size` samples, each divided by its own tokens; the loss weighted by their number of samples, the
metrics not weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from posttrain.data.planning import PLAIN, Packing, plan
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
    batch_done: Callable[[], None] = lambda: None,
    packing: Packing = PLAIN,
    annotate: Callable[[Batch], Batch] = lambda batch: batch,
) -> dict[str, float] | None:
    """`{"loss": ..., metric: ...}`, or None if `stopped()` came true on the way. `batch_done` is told of each batch."""
    total = 0.0
    means: dict[str, list[float]] = {}
    for first in range(0, len(samples), batch_size):
        group = samples[first : first + batch_size]
        micro = plan(group, token_budget, packing)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for batch in micro:
            if stopped():
                return None
            batch = annotate(batch)
            terms, metrics = objective(forward(batch, objective.needs), batch)
            for unit, term in terms.items():
                total += float(term) / max(1, sum(part.counts[unit] for part in micro)) * len(group)
            for name, (value, count) in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
                counts[name] = counts.get(name, 0) + count
        for name, total_of_group in sums.items():
            means.setdefault(name, []).append(total_of_group / max(1, counts[name]))
        batch_done()
    return {"loss": total / max(1, len(samples)), **{name: sum(each) / len(each) for name, each in means.items()}}
