"""Loss and metrics of an objective over held-out samples.

All are averaged as transformers and TRL average them, so that they can be compared: over evaluation batches of
`per_device_eval_batch_size` samples, each divided by its own tokens; the loss weighted by their number of samples, the
metrics not weighted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from posttrain.data.planning import PLAIN, Packing, plan
from posttrain.objectives.base import Objective
from posttrain.shortage import is_out_of_memory, shortage_of, smaller_budget
from posttrain.types import Batch, Needs, Outputs, Sample

logger = logging.getLogger("posttrain")


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
    first = 0
    while first < len(samples):
        group = samples[first : first + batch_size]
        micro, shortage = plan(group, token_budget, packing), None
        try:
            found = _group(forward, objective, micro, stopped, annotate)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = shortage_of(error, "evaluation", None)
        if shortage is not None:  # the error is gone by now, and with it what it held
            token_budget = smaller_budget(token_budget, micro, shortage)
            continue
        if found is None:
            return None
        loss, metrics = found
        total += loss * len(group)
        for name, mean in metrics.items():
            means.setdefault(name, []).append(mean)
        first += batch_size
        batch_done()
    return {"loss": total / max(1, len(samples)), **{name: sum(each) / len(each) for name, each in means.items()}}


def _group(
    forward: Callable[[Batch, Needs], Outputs],
    objective: Objective,
    micro: Sequence[Batch],
    stopped: Callable[[], bool],
    annotate: Callable[[Batch], Batch],
) -> tuple[float, dict[str, float]] | None:
    """Loss and metrics of one evaluation batch, by its own tokens; None if `stopped()` came true."""
    loss = 0.0
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for batch in micro:
        if stopped():
            return None
        batch = annotate(batch)
        terms, metrics = objective(forward(batch, objective.needs), batch)
        for unit, term in terms.items():
            loss += float(term) / max(1, sum(part.counts[unit] for part in micro))
        for name, (value, count) in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
            counts[name] = counts.get(name, 0) + float(count)
    return loss, {name: value / max(1, counts[name]) for name, value in sums.items()}
