"""How much arithmetic a batch needs, and how much this machine can do: their ratio says how close to the limit we are.

Counted are the matrix products that the mathematics asks for: linear layers on real tokens, attention inside segments,
the head on supervised rows; a frozen weight has no weight gradient. Recomputation is not counted as useful.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from posttrain.types import Batch

SMALLEST = 32
"""Adapters' matrices are narrower; their products are not what a machine is measured by."""


def flops_counter(base: Any) -> Callable[[Batch], float]:
    """A function from a batch to the floating-point operations of one forward and backward over it."""
    head = _head(base)
    passes_per_token = 0.0
    for module in base.base_model.modules():
        weight = module._parameters.get("weight")  # not the attribute: PEFT's layers show their base layer's
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            passes_per_token += weight.numel() * (3 if weight.requires_grad else 2)
    head_passes = 0 if head is None else head.numel() * (3 if head.requires_grad else 2)
    attention = _attention_width(base)

    def count(batch: Batch) -> float:
        layout = batch.layout
        pairs = sum(
            n * (n + 1) / 2 + n * (seen - n) for n, seen in zip(layout.lengths, layout.context_lengths, strict=True)
        )
        linear = 2 * passes_per_token * batch.num_tokens
        return linear + 2 * head_passes * len(batch.rows_R) + 12 * attention * pairs

    return count


def _head(base: Any) -> torch.Tensor | None:
    """The language-model head's weight; a reward model's one row is not worth counting."""
    head = base.get_output_embeddings()
    return None if head is None else head.weight


def _attention_width(base: Any) -> int:
    """Query heads x head size, summed over attention layers."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # a model without attention
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    return sum("attention" in kind for kind in kinds) * heads * size


def measure_limit(base: Any, dtype: torch.dtype, tokens: int = 1024, seconds: float = 1.0) -> float:
    """Floating-point operations per second of the matrix products that training this model is made of, and nothing
    else: every linear layer's shape on `tokens` rows, forward and backward, as often as the model has it; each at its
    best of what fits in about `seconds` in all."""
    device = base.get_input_embeddings().weight.device
    shapes = _shapes(base)
    share = seconds / max(1, len(shapes))
    flops = spent = 0.0
    for (out_features, in_features, trained), count in shapes.items():
        x = torch.full((tokens, in_features), 0.5, device=device, dtype=dtype)
        weight = torch.full((out_features, in_features), 0.5, device=device, dtype=dtype)
        grad = torch.full((tokens, out_features), 0.5, device=device, dtype=dtype)
        products = [(x, weight.t()), (grad, weight)] + ([(grad.t(), x)] if trained else [])
        spent += count * sum(_best_time(left, right, share / len(products)) for left, right in products)
        flops += count * 2 * tokens * out_features * in_features * len(products)
    return flops / spent


def _shapes(base: Any) -> Counter[tuple[int, int, bool]]:
    """`(out, in, trained)` of the linear layers and the head, and how many there are of each."""
    head = _head(base)
    shapes: Counter[tuple[int, int, bool]] = Counter()
    if head is not None:
        shapes[(*head.shape, head.requires_grad)] = 1
    for module in base.base_model.modules():
        weight = module._parameters.get("weight")
        is_layer = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if is_layer and isinstance(weight, torch.Tensor) and weight.dim() == 2 and min(weight.shape) >= SMALLEST:
            shapes[(*weight.shape, weight.requires_grad)] += 1
    return shapes


def _best_time(left: torch.Tensor, right: torch.Tensor, seconds: float) -> float:
    out = left @ right
    best, end = float("inf"), time.perf_counter() + seconds
    for _ in range(100):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if left.is_cuda:
            torch.cuda.synchronize(left.device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            break
    return best
