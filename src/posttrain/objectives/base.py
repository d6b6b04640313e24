"""What every objective is: the needs it states, and a pure call that returns sums with their units.

The loop divides each sum by the count of its unit over the whole optimiser step, so how a step was cut into
micro-batches, packed, or spread over processes cannot change the loss.
"""

from __future__ import annotations

from typing import Protocol

import torch

from posttrain.types import Batch, Needs, Outputs

Terms = dict[str, torch.Tensor]
"""Summed loss by unit, e.g. `{"tokens": sum}`."""

Metrics = dict[str, tuple[torch.Tensor, float | torch.Tensor]]
"""Sum and count by metric name; tensors stay on the device until they are logged."""


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
