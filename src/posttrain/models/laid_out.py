"""Frozen weights laid out as the backward pass reads them, on a CPU in bf16.

The gradient of a linear layer's input is a product with the weight's transpose, which oneDNN has to lay out anew each
time; that of a frozen weight can be laid out once. It costs a second copy of the weights that have adapters and makes
half of a LoRA step's large products a fifth faster, with the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain.models.adapters import LeanLora

ROWS = 1024
"""Rows of a typical product; the layout serves others too."""


class Transposed:
    """`x W` for a frozen W `(out, in)`, which is laid out anew once it has changed: an adapter was merged into it, or
    other weights loaded. A copy of the layer, or one from a file, comes without."""

    def __init__(self, weight: torch.Tensor):
        self._weight = weight
        self._lay_out()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._seen != _state(self._weight):
            self._lay_out()
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")

    def _lay_out(self) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach().t().contiguous(), ROWS)
        self._seen = _state(self._weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _state(weight: torch.Tensor) -> tuple[int, int]:
    """Changes with the weight's numbers."""
    return weight.data_ptr(), weight._version


def lay_out(model: nn.Module) -> None:
    """Every weight that `laid_out_bytes` counts, once."""
    for layer in _layers(model):
        if layer.transposed is None:
            layer.transposed = Transposed(layer.base_layer.weight)


def take_back(model: nn.Module) -> None:
    """Without the second copies again."""
    for module in model.modules():
        if isinstance(module, LeanLora):
            module.transposed = None


def laid_out_bytes(model: nn.Module) -> int:
    """What the second copies take."""
    return sum(layer.base_layer.weight.nbytes for layer in _layers(model) if layer.transposed is None)


def _layers(model: nn.Module) -> list[Any]:
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return []
    found = (module for module in model.modules() if isinstance(module, LeanLora) and module.ordinary_adapter())
    return [layer for layer in found if _fits(layer.base_layer.weight)]


def _fits(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16
