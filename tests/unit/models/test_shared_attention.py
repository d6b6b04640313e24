"""Attention where prompts stand once before their answers, against dense scores under one big mask: the loop over
segments, and the one varlen call for CUDA, whose kernel is written down plainly here as its documentation has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen

from posttrain.models.attention import _varlen, packed_attention
from posttrain.types import Layout

LAYOUT = Layout((0, 6, 10, 11, 20, 22, 25, 27), (6, 4, 1, 9, 2, 3, 2, 4), (-1, 0, 0, -1, 3, 3, 1, 1))
"""Two prompts with two answers each, one of them a single token, another with two ends."""
TOKENS, SCALE = LAYOUT.num_tokens, 0.4


def inputs(groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, TOKENS, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, groups, groups)
    ]


def dense(query: Any, key: Any, value: Any, window: int | None) -> torch.Tensor:
    """A token sees what its segment continues and its own before it, as far back as the window goes in positions."""
    sees = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    position = torch.empty(TOKENS, dtype=torch.long)
    for own, before in LAYOUT.segments():
        position[own] = torch.arange(own.stop - own.start) + sum(part.stop - part.start for part in before)
        for part in (*before, own):
            sees[own, part] = True
    back = position[:, None] - position
    sees &= (back >= 0) & (back < (window or 10**9))
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    scores = (query @ key.mT * SCALE).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Of every sequence: query i sees the keys from `i + shift - left` to `i + shift + right`, aligned at the end."""
    outputs = []
    starts_q, starts_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (starts_q[-1], starts_k[-1]) == (len(query), len(key))
    spans = zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
    for from_q, to_q, from_k, to_k in spans:
        asked, there = to_q - from_q, to_k - from_k
        assert asked <= max_q
        assert there <= max_k
        one, seen, said = query[from_q:to_q], key[from_k:to_k], value[from_k:to_k]
        if enable_gqa:
            seen, said = (x.repeat_interleave(one.shape[1] // x.shape[1], 1) for x in (seen, said))
        scores = torch.einsum("qhe,khe->hqk", one, seen) * (scale or one.shape[-1] ** -0.5)
        ahead = torch.arange(there) - (torch.arange(asked)[:, None] + there - asked)
        left, right = window_size
        hidden = (ahead > right) | ((ahead < -left) if left >= 0 else torch.zeros_like(ahead, dtype=torch.bool))
        outputs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), said))
    return torch.cat(outputs)


def by_segments(*tensors: torch.Tensor, window: int | None) -> torch.Tensor:
    return packed_attention(nn.Module(), *tensors, None, scaling=SCALE, layout=LAYOUT, sliding_window=window)[0]


def by_varlen(*tensors: torch.Tensor, window: int | None) -> torch.Tensor:
    return _varlen(*tensors, LAYOUT, SCALE, window)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 40])
@pytest.mark.parametrize("attend", [by_segments, by_varlen])
def test_equals_dense(
    attend: Callable[..., torch.Tensor], window: int | None, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    ours, theirs = inputs(groups), inputs(groups)
    output, expected = attend(*ours, window=window), dense(*theirs, window)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_gradients_of_what_hundreds_see_are_summed_in_fp32() -> None:
    many = 300
    layout = Layout((0, *range(40, 40 + 2 * many, 2)), (40, *(2,) * many), (-1, *(0,) * many))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, layout.num_tokens, 8, generator=generator) for _ in range(3)]
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [one.to(torch.bfloat16).to(dtype).requires_grad_() for one in given]
        # A cap, so that no quicker attention takes it.
        out, _ = packed_attention(nn.Module(), *tensors, None, scaling=SCALE, layout=layout, softcap=50.0)
        grads.append(torch.autograd.grad(out.square().sum(), tensors[1:]))
    for one, exact in zip(*grads, strict=True):
        shared, expected = one[:, :, :40].double(), exact[:, :, :40]
        assert (shared - expected).norm() < 0.01 * expected.norm()
