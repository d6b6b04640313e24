"""What of the activations is made again in the backward pass instead of being kept. It never changes a number.

* `none`: everything that a gradient needs is kept.
* `selective`: what costs little to make again is: the outputs of norms (element-wise work) and the probabilities of
  short segments' attention (one small product). A quarter to a third of the memory, for a few per cent of the time.
* `full`: only each layer's input is kept (transformers' activation checkpointing), for about a third of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LEVELS = ("none", "selective", "full")


def recompute_layers(base: Any, options: dict[str, Any] | None) -> None:
    """Non-reentrant checkpointing, which needs no gradient on the inputs and keeps random state exact."""
    options = dict(options or {})
    layers = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    base.activation_checkpointing_enable({"use_reentrant": False, **options}, **layers)


class Recipe:
    """How to make a tensor again. It hangs on the tensor's storage, so that whoever keeps the tensor, or a view of it,
    can keep the recipe in its place. One made again serves all who asked for it, and goes with the last of them."""

    def __init__(self, make: Any):
        self._make, self._takers, self._made = make, 0, None

    def attach(self, tensor: torch.Tensor) -> None:
        tensor.untyped_storage().posttrain_recipe = self  # type: ignore[attr-defined]

    def keep(self, shape: torch.Size) -> tuple[Recipe, torch.Size]:
        self._takers += 1
        return self, shape

    def make(self, shape: torch.Size) -> torch.Tensor:
        made = self._make() if self._made is None else self._made
        self._takers -= 1
        self._made = made if self._takers > 0 else None
        return made.view(shape)


@contextmanager
def keeping_recipes() -> Iterator[None]:
    """Inside, tensors that have a recipe are not kept for the backward pass."""

    def keep(tensor: torch.Tensor) -> Any:
        recipe = getattr(tensor.untyped_storage(), "posttrain_recipe", None)
        whole = tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        return recipe.keep(tensor.shape) if recipe is not None and whole else tensor

    def give(kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept[0].make(kept[1])

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield
