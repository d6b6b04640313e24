"""How much arithmetic a batch needs, and how much this machine can do: their ratio says how close to the limit we are.

Counted are the matrix products that the mathematics asks for: linear layers on real tokens, attention inside segments,
the head on supervised rows; a frozen weight has no weight gradient. Recomputation is not counted as useful.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from posttrain.types import Batch


def flops_counter(base: Any) -> Callable[[Batch], float]:
    """A function from a batch to the floating-point operations of one forward and backward over it."""
    head = base.get_output_embeddings()
    passes_per_token = 0.0
    for module in base.base_model.modules():
        weight = module._parameters.get("weight")  # not the attribute: PEFT's layers show their base layer's
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            passes_per_token += weight.numel() * (3 if weight.requires_grad else 2)
    head_passes = head.weight.numel() * (3 if head.weight.requires_grad else 2)
    attention = _attention_width(base)

    def count(batch: Batch) -> float:
        pairs = sum(n * (n + 1) / 2 for n in batch.layout.lengths)
        linear = 2 * passes_per_token * batch.num_tokens
        return linear + 2 * head_passes * len(batch.rows_R) + 12 * attention * pairs

    return count


def _attention_width(base: Any) -> int:
    """Query heads x head size, summed over attention layers."""
    config = base.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    return sum("attention" in kind for kind in kinds) * config.num_attention_heads * size


def measure_limit(base: Any, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations per second of matrix products at the model's own shape, the best of what fits in
    `seconds`."""
    config = base.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    device = base.get_input_embeddings().weight.device
    left = torch.full((1024, width), 0.5, device=device, dtype=dtype)
    right = torch.full((inner, width), 0.5, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    for attempt in range(1000):
        start = time.perf_counter()
        left @ right.t()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end and attempt:
            break
    return 2 * left.numel() * inner / best
