"""Attention over a packed batch, registered with transformers under a name of its own.

Every segment attends to itself only, causally, inside the model's sliding window where it has one. The layout comes as
a keyword argument that transformers hands through to each attention layer, with plain integers in it, so that nothing
asks the device. On CUDA in half precision the whole batch is one varlen call (`torch.nn.attention.varlen`); on a CPU
it is a kernel of our own where there is one (`fused_attention`), else short segments in bf16 are batched matrix
products (`segment_attention`); elsewhere, and where the model caps its attention scores, it is a loop of SDPA over
segments. A call without a layout (generation, a plain forward by the user)
goes to transformers' own SDPA with the mask transformers builds for it.

Left out: attention sinks and ALiBi. A model that has them fails the self-check and runs padded, with its own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from posttrain.models.decoding import Memory, Reading
from posttrain.models.fused_attention import can_fuse, fused_attention
from posttrain.models.segment_attention import MAX_LENGTH, segment_attention
from posttrain.types import Layout

PACKED_ATTENTION = "posttrain_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | Memory | None = None,
    keeps_weights: bool = True,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Queries of shape `(1, heads, T, head_dim)`, keys and values with as many or fewer heads, to `(1, T, heads,
    head_dim)`. Without `keeps_weights` the attention's weights are made again in the backward pass."""
    if layout is None:
        if softcap is not None:
            return _plainly_capped(query, key, value, attention_mask, dropout, scaling, softcap), None
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if isinstance(layout, Memory):
        scale = scaling or query.shape[-1] ** -0.5
        return layout.attend(module.layer_idx, query, key, value, scale, sliding_window, softcap), None
    if isinstance(layout, Reading) and layout.memory is not None:
        layout.memory.remember(module.layer_idx, key, value, layout)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None and not dropout:
        return _varlen(query, key, value, layout, scaling, sliding_window), None
    if softcap is None and not dropout and can_fuse(query, value, layout, sliding_window or None):
        return fused_attention(
            query, key, value, layout, scaling or query.shape[-1] ** -0.5, sliding_window or None
        ), None
    if softcap is None and not dropout and _is_quicker_by_products(query, layout, sliding_window):
        scale = scaling or query.shape[-1] ** -0.5
        return segment_attention(query, key, value, layout, scale, keeps_weights), None
    queries = query.split(list(layout.lengths), dim=2)
    keys, values = (_seen(one, 2, layout).split(list(layout.context_lengths), dim=2) for one in (key, value))
    attend = _capped(softcap) if softcap is not None else scaled_dot_product_attention
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    outputs = [
        attend(q, k, v, **options, **_mask(q, k, layout, sliding_window))
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _seen(one: torch.Tensor, dim: int, layout: Layout) -> torch.Tensor:
    """Keys or values of each segment, behind those that it continues; tokens are dimension `dim`."""
    if not layout.is_shared:
        return one
    if "seen" not in layout.made:
        parts = (part for own, before in layout.segments() for part in (*before, own))
        index = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        layout.made["seen"] = index.to(one.device, non_blocking=True)
    return _Gathered.apply(one, layout.made["seen"], dim)


class _Gathered(torch.autograd.Function):
    """Gradients of what is there many times are summed in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, one: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = one.shape, dim
        return one.index_select(dim, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        (index,), (grad,) = ctx.saved_tensors, grads
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        return total.index_add_(ctx.dim, index, grad.to(total.dtype)).to(grad.dtype), None, None


def _is_quicker_by_products(query: torch.Tensor, layout: Layout, window: int | None) -> bool:
    """Short segments in bf16 on a CPU: there SDPA's backward pass is slow (in fp32 it is not)."""
    limit = MAX_LENGTH if window is None else min(window, MAX_LENGTH)
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and layout.max_length <= limit


def _mask(query: torch.Tensor, key: torch.Tensor, layout: Layout, window: int | None) -> dict[str, Any]:
    """Causal, or a causal band where the segment is longer than the window. The last query sees the last key. Autograd
    keeps a band; segments of the same lengths have one, in all layers."""
    asked, there = query.shape[2], key.shape[2]
    if window is not None and window >= there:
        window = None
    if asked == there and window is None:
        return {"is_causal": True}
    key_of_band = (asked, there, window, query.dtype)
    if key_of_band not in layout.made:
        position = torch.arange(there, device=query.device)
        distance = position[there - asked :, None] - position
        hidden = (distance < 0) | (distance >= (window or there))
        layout.made[key_of_band] = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
    return {"attn_mask": layout.made[key_of_band]}


def _plainly_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float,
) -> torch.Tensor:
    """For generation and plain forwards of models that cap their scores; no mask means that a single token is asked
    for, or that all come at once."""
    attend = _capped(softcap)
    if mask is None and query.shape[2] == 1:
        mask = torch.ones(1, key.shape[2], dtype=torch.bool, device=query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = attend(query, key, value, dropout, scale, query.shape[1] != key.shape[1], mask is None, mask)
    return output.transpose(1, 2).contiguous()


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """Attention whose scores pass through `cap * tanh(score / cap)` (Gemma 2), which SDPA does not know."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float,
        scale: float,
        enable_gqa: bool,
        is_causal: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = softcap * torch.tanh(query @ key.mT * scale / softcap)
        if is_causal or attn_mask is None:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < 0
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)  # a padded row sees nothing at all
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.nn.functional.dropout(weights, dropout_p) @ value

    return attend


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float | None, window: int | None
) -> torch.Tensor:
    """One FlashAttention call over all segments; the keys of a segment are gathered behind those that it continues, and
    its queries are the last of them."""
    from torch.nn.attention.varlen import varlen_attn

    key_rows, value_rows = (_seen(_rows(one), 0, layout) for one in (key, value))
    bounds, key_bounds = _bounds(layout, query.device)
    output = varlen_attn(
        _rows(query),
        key_rows,
        value_rows,
        bounds,
        key_bounds,
        max(layout.lengths),
        layout.max_length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def _bounds(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where segments begin and end, of queries and of the keys that they see; once for all layers."""
    if "bounds" not in layout.made:
        ends = (0, *accumulate(layout.context_lengths))
        both = torch.tensor(((*layout.starts, layout.num_tokens), ends), dtype=torch.int32)
        layout.made["bounds"] = tuple(both.to(device, non_blocking=True))
    return layout.made["bounds"]


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """`(1, heads, T, head_dim)` to `(T, heads, head_dim)`."""
    return tensor[0].transpose(0, 1).contiguous()


def register() -> None:
    """Make `PACKED_ATTENTION` known to transformers; masks for calls without a layout are SDPA's."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
