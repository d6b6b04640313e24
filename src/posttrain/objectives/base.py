"""What every objective is: the needs it states, and a pure call that returns sums with their units.

The loop divides each sum by the count of its unit over the whole optimiser step, so how a step was cut into
micro-batches, packed, or spread over processes cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from posttrain.types import Batch, Needs, Outputs

Terms = dict[str, torch.Tensor]
"""Summed loss by unit, e.g. `{"tokens": sum}`."""

Metrics = dict[str, tuple[torch.Tensor, float | torch.Tensor]]
"""Sum and count by metric name; tensors stay on the device until they are logged."""

GIVEN = "logged/"
"""Before the names of metrics that rewards log themselves, until it is known which names the run has."""


class Objective(Protocol):
    """`(Outputs, Batch) -> (Terms, Metrics)`."""

    @property
    def needs(self) -> Needs: ...

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry `ref_logp_R`."""
        ...

    @property
    def is_sum(self) -> bool:
        """Whether the loss is a sum over samples. One that is not is computed over whole batches of the user's size,
        which are its unit ("batches")."""
        ...

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]: ...


def by_given_names(logs: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """What rewards have logged under the names that they gave; and which of these the run has a number of its own for,
    so that they stay `logged/...`."""
    plain = {name: name.removeprefix(GIVEN) for name in logs if name.startswith(GIVEN)}
    taken = [given for name, given in plain.items() if given in logs]
    return {name if plain.get(name) in taken else plain.get(name, name): value for name, value in logs.items()}, taken
