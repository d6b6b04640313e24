"""Causal attention of short segments on a CPU, as batched matrix products.

PyTorch's flash kernel for CPUs is slow in its backward pass; for segments of a few hundred tokens it is quicker to
write the scores down. Per segment: scores by one batched product (query heads that share a key head are stacked as
rows), a soft-max, and the probabilities kept in the compute dtype for a backward pass of four products; or made again
there, for one product and a soft-max more, where memory is short. A segment with a parent (an answer to a shared
prompt) looks at what it continues as well.
Gradients go straight into one tensor each. Memory grows with the square of a segment's length, so long ones are left to
SDPA; `MAX_LENGTH` is where the two cross (benchmarks/RESULTS.md).

Shape suffixes: `T` tokens, `H` query heads, `K` key heads, `G` query heads of a key head, `N` a segment's tokens, `E`
head size.
"""

from __future__ import annotations

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
        for own, before in layout.segments():
            query_KRE = _stacked(query_HTE[:, own], groups)
            p_KRN = _weights(query_KRE, _seen(key_KTE, own, before), masks, scale)
            _unstack(p_KRN @ _seen(value_KTE, own, before), output_THE[own])
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
        grad_query_THE = query_HTE.new_empty(query_HTE.shape[1], query_HTE.shape[0], query_HTE.shape[2])
        grad_key, grad_value = (_KeyGradient(one, ctx.layout) for one in (key_KTE, value_KTE))
        masks = _Masks(query_HTE.shape[0] // groups, query_HTE)
        kept = iter(weights)
        for own, before in ctx.layout.segments():
            query_KRE, grad_KRE = (_stacked(x, groups) for x in (query_HTE[:, own], grad_THE[own].transpose(0, 1)))
            key_KNE = _seen(key_KTE, own, before)
            p_KRN = next(kept) if weights else _weights(query_KRE, key_KNE, masks, scale)
            grad_value.add(p_KRN.mT @ grad_KRE, own, before)
            weight_grad_KRN = grad_KRE @ _seen(value_KTE, own, before).mT
            score_KRN = torch._softmax_backward_data(weight_grad_KRN, p_KRN, -1, p_KRN.dtype)
            _unstack(score_KRN @ key_KNE, grad_query_THE[own])
            grad_key.add(score_KRN.mT @ query_KRE, own, before)
        grads_TXE = (grad_query_THE.mul_(scale), grad_key.total().mul_(scale), grad_value.total())
        return *(grad.transpose(0, 1) for grad in grads_TXE), None, None, None


class _KeyGradient:
    """The gradient of keys or values. What is added to those of a segment that others continue is summed in fp32."""

    def __init__(self, like_KTE: torch.Tensor, layout: Layout):
        groups, tokens, size = like_KTE.shape
        self._grad_TKE = like_KTE.new_empty(tokens, groups, size)
        continued = (layout.starts[parent] for parent in {*layout.parents} - {-1})
        self._shared: dict[int, torch.Tensor | None] = dict.fromkeys(continued)

    def add(self, grad_KNE: torch.Tensor, own: slice, before: tuple[slice, ...]) -> None:
        """Of a segment's own tokens, behind those that it continues."""
        grads = grad_KNE.split([part.stop - part.start for part in (*before, own)], 1)
        for part, grad_KME in zip((*before, own), grads, strict=True):
            if part.start not in self._shared:
                self._grad_TKE[part] = grad_KME.transpose(0, 1)
            elif (total_MKE := self._shared[part.start]) is None:
                self._shared[part.start] = grad_KME.transpose(0, 1).float()
            else:
                total_MKE.add_(grad_KME.transpose(0, 1))

    def total(self) -> torch.Tensor:
        for start, total_MKE in self._shared.items():
            assert total_MKE is not None
            self._grad_TKE[start : start + len(total_MKE)] = total_MKE
        return self._grad_TKE


def _weights(query_KRE: torch.Tensor, key_KNE: torch.Tensor, masks: _Masks, scale: float) -> torch.Tensor:
    """Mask and scale ride on the product; soft-max computes in fp32 and rounds once."""
    mask_1RN = masks.of(query_KRE.shape[1] // masks.heads, key_KNE.shape[1])
    return torch.softmax(torch.baddbmm(mask_1RN, query_KRE, key_KNE.mT, alpha=scale), -1)


class _Masks:
    """What is added to the scores of a segment: 0, and minus infinity for what lies ahead. One for each pair of
    lengths."""

    def __init__(self, heads_per_group: int, like: torch.Tensor):
        self.heads, self._like = heads_per_group, like
        self._made: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, asked: int, there: int) -> torch.Tensor:
        """`(1, G x asked, there)`; the last query sees everything."""
        if (asked, there) not in self._made:
            ahead = torch.full((asked, there), -torch.inf, dtype=self._like.dtype).triu_(1 + there - asked)
            self._made[asked, there] = ahead.repeat(self.heads, 1)[None]
        return self._made[asked, there]


def _seen(keys_KTE: torch.Tensor, own: slice, before: tuple[slice, ...]) -> torch.Tensor:
    """What a segment's tokens look at: those that it continues and its own."""
    return torch.cat([keys_KTE[:, part] for part in (*before, own)], 1) if before else keys_KTE[:, own]


def _stacked(query_HNE: torch.Tensor, groups: int) -> torch.Tensor:
    """`(H, N, E)` to `(K, G N, E)`: the query heads of one key head as one stack of rows."""
    return query_HNE.reshape(groups, -1, query_HNE.shape[-1])


def _unstack(rows_KRE: torch.Tensor, out_NHE: torch.Tensor) -> None:
    """`(K, G N, E)` into `(N, H, E)`."""
    length, heads, size = out_NHE.shape
    out_NHE.copy_(rows_KRE.reshape(heads, length, size).transpose(0, 1))
