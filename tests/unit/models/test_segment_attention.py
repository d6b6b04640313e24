"""Attention of short segments by batched products: SDPA's values and gradients, segment by segment."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from posttrain.models.segment_attention import segment_attention
from posttrain.types import Layout

LENGTHS = (7, 1, 12)
LAYOUT = Layout((0, 7, 8), LENGTHS)


def inputs(dtype: torch.dtype, groups: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, sum(LENGTHS), 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (4, groups, groups)
    ]


def by_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    pieces = zip(*(tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(*piece, is_causal=True, scale=0.3, enable_gqa=True) for piece in pieces]
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_equals_sdpa(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = inputs(dtype, groups), inputs(dtype, groups)
    output, expected = segment_attention(*ours, LAYOUT, 0.3), by_sdpa(*theirs)
    assert output.shape == expected.shape == (1, sum(LENGTHS), 4, 8)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(dtype)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=tolerance, rtol=tolerance)


def test_gradients_in_float64() -> None:
    assert torch.autograd.gradcheck(lambda q, k, v: segment_attention(q, k, v, LAYOUT, 0.3), inputs(torch.float64))


def test_a_later_token_changes_nothing_before_it_and_nothing_in_other_segments() -> None:
    query, key, value = (tensor.detach() for tensor in inputs(torch.float32))
    before = segment_attention(query, key, value, LAYOUT, 0.3)
    value[:, :, 5] += 1
    changed = (segment_attention(query, key, value, LAYOUT, 0.3) != before).flatten(2).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [5, 6]
