"""Causal attention of short segments on a CPU, as batched matrix products.

PyTorch's flash kernel for CPUs is slow in its backward pass; for segments of a few hundred tokens it is quicker to
write the scores down. Per segment: scores by one batched product (query heads that share a key head are stacked as
rows), a soft-max, and the probabilities kept in the compute dtype for a backward pass of four products; or made again
there, for one product and a soft-max more, where memory is short.
Gradients go straight into one tensor each. Memory grows with the square of a segment's length, so long ones are left to
SDPA; `MAX_LENGTH` is where the two cross (benchmarks/RESULTS.md).

Shape suffixes: `T` tokens, `H` query heads, `K` key heads, `G` query heads of a key head, `N` a segment's tokens, `E`
head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from posttrain.types import Layout

MAX_LENGTH = 512


def segment_attention(
    query_1HTE: torch.Tensor,
    key_1KTE: torch.Tensor,
    value_1KTE: torch.Tensor,
    layout: Layout,
    scale: float,
    keeps_weights: bool = True,
) -> torch.Tensor:
    """`(1, T, H, E)`: every token attends to itself and what precedes it in its own segment."""
    return _SegmentAttention.apply(query_1HTE[0], key_1KTE[0], value_1KTE[0], layout, scale, keeps_weights)[None]


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_HTE: torch.Tensor,
        key_KTE: torch.Tensor,
        value_KTE: torch.Tensor,
        layout: Layout,
        scale: float,
        keeps_weights: bool,
    ) -> torch.Tensor:
        heads, tokens, _ = query_HTE.shape
        groups = key_KTE.shape[0]
        output_THE = query_HTE.new_empty(tokens, heads, value_KTE.shape[-1])
        masks = _Masks(heads // groups, query_HTE)
        weights = []
        for segment, length in _segments(layout):
            query_KRE = _stacked(query_HTE[:, segment], groups)
            p_KRN = _weights(query_KRE, key_KTE[:, segment], masks.of(length), scale)
            _unstack(p_KRN @ value_KTE[:, segment], output_THE[segment])
            if keeps_weights:
                weights.append(p_KRN)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query_HTE, key_KTE, value_KTE, *weights)
        return output_THE

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_THE = grads[0]
        query_HTE, key_KTE, value_KTE, *weights = ctx.saved_tensors
        groups, scale = key_KTE.shape[0], ctx.scale
        grad_query_THE, grad_key_TKE, grad_value_TKE = (
            tensor.new_empty(tensor.shape[1], tensor.shape[0], tensor.shape[2])
            for tensor in (query_HTE, key_KTE, value_KTE)
        )
        masks = _Masks(query_HTE.shape[0] // groups, query_HTE)
        kept = iter(weights)
        for segment, length in _segments(ctx.layout):
            query, key, value = _stacked(query_HTE[:, segment], groups), key_KTE[:, segment], value_KTE[:, segment]
            p_KRN = next(kept) if weights else _weights(query, key, masks.of(length), scale)
            grad = _stacked(grad_THE[segment].transpose(0, 1), groups)
            grad_value_TKE[segment] = (p_KRN.mT @ grad).transpose(0, 1)
            score_KRN = torch._softmax_backward_data(grad @ value.mT, p_KRN, -1, p_KRN.dtype)
            _unstack(score_KRN @ key, grad_query_THE[segment])
            grad_key_TKE[segment] = (score_KRN.mT @ query).transpose(0, 1)
        grad_query_THE *= scale
        grad_key_TKE *= scale
        grads_HTE = (tensor.transpose(0, 1) for tensor in (grad_query_THE, grad_key_TKE, grad_value_TKE))
        return *grads_HTE, None, None, None


def _weights(query_KRE: torch.Tensor, key_KNE: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Mask and scale ride on the product; soft-max computes in fp32 and rounds once."""
    return torch.softmax(torch.baddbmm(mask, query_KRE, key_KNE.mT, alpha=scale), -1)


class _Masks:
    """What is added to the scores of a segment: 0, and minus infinity for what lies ahead. One per length."""

    def __init__(self, heads_per_group: int, like: torch.Tensor):
        self._heads, self._like = heads_per_group, like
        self._made: dict[int, torch.Tensor] = {}

    def of(self, length: int) -> torch.Tensor:
        """`(1, G N, N)`."""
        if length not in self._made:
            ahead_NN = torch.full((length, length), -torch.inf, dtype=self._like.dtype).triu_(1)
            self._made[length] = ahead_NN.repeat(self._heads, 1)[None]
        return self._made[length]


def _segments(layout: Layout) -> Iterator[tuple[slice, int]]:
    return ((slice(start, start + n), n) for start, n in zip(layout.starts, layout.lengths, strict=True))


def _stacked(query_HNE: torch.Tensor, groups: int) -> torch.Tensor:
    """`(H, N, E)` to `(K, G N, E)`: the query heads of one key head as one stack of rows."""
    return query_HNE.reshape(groups, -1, query_HNE.shape[-1])


def _unstack(rows_KRE: torch.Tensor, out_NHE: torch.Tensor) -> None:
    """`(K, G N, E)` into `(N, H, E)`."""
    length, heads, size = out_NHE.shape
    out_NHE.copy_(rows_KRE.reshape(heads, length, size).transpose(0, 1))
