"""What the policy's completions of held-out prompts are worth, and what the loss would be on them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from posttrain.models.forward import Policy
from posttrain.objectives.base import Metrics, Objective, by_given_names
from posttrain.rollout.source import RolloutSource


def evaluate_rollouts(
    source: RolloutSource, policy: Policy, objective: Objective, batch_done: Callable[[], None]
) -> dict[str, float]:
    """Means over all prompts, of which the last round may have fewer. Completions are those that the prompts' places
    in the data make, whatever the rounds. Raises Stopped."""
    sums: dict[str, tuple[float, float]] = {}

    def add(metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            before, counted = sums.get(name, (0.0, 0.0))
            sums[name] = before + float(total), counted + float(count)

    source.report = add
    loss = 0.0
    for number in source.every_round():
        share = len(source.places_of(number)) / source.rounds.num_prompts
        micro = source.batches_of(number)
        counts: dict[str, float] = {}
        for batch in micro:
            for unit, count in batch.counts.items():
                counts[unit] = counts.get(unit, 0) + count
        for batch in micro:
            with torch.no_grad():
                terms, metrics = objective(policy(batch, objective.needs), batch.to(policy.device))
            loss += share * sum(float(term) / max(1, counts[unit]) for unit, term in terms.items())
            add(metrics)
        batch_done()
    made = {"loss": loss, **{name: total / count for name, (total, count) in sums.items() if count}}
    return by_given_names(made)[0]
