"""Packed attention against dense scores under one big mask: block by block causal, inside the window, capped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from posttrain import native
from posttrain.models import attention
from posttrain.models.attention import PACKED_ATTENTION, packed_attention, register
from posttrain.models.forward import open_policy
from posttrain.types import Layout, Needs
from tests.tiny_batches import random_batch
from tests.tiny_models import tiny_model

LENGTHS = (7, 1, 12, 5)
LAYOUT = Layout((0, 7, 8, 20), LENGTHS)
SCALE = 0.4


def inputs(groups: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, sum(LENGTHS), 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (4, groups, groups)
    ]


def allowed(window: int | None) -> torch.Tensor:
    """Which token sees which."""
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    back = torch.arange(sum(LENGTHS))[:, None] - torch.arange(sum(LENGTHS))
    return (segment[:, None] == segment) & (back >= 0) & (back < (window or 10**9))


def dense(query: Any, key: Any, value: Any, window: int | None, softcap: float | None) -> torch.Tensor:
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    scores = query @ key.mT * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~allowed(window), -torch.inf).softmax(-1) @ value).transpose(1, 2)


def packed(tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
    output, weights = packed_attention(nn.Module(), *tensors, None, scaling=SCALE, layout=LAYOUT, **options)
    assert weights is None
    return output


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 12, 40])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_equals_dense(groups: int, window: int | None, softcap: float | None) -> None:
    ours, theirs = inputs(groups), inputs(groups)
    output = packed(ours, sliding_window=window, softcap=softcap)
    expected = dense(*theirs, window, softcap)
    tolerance = 1e-10 if softcap is None else 1e-5  # capped scores have an fp32 soft-max
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 3])
def test_bf16(window: int | None, softcap: float | None) -> None:
    expected = dense(*inputs(2), window, softcap)
    output = packed(inputs(2, torch.bfloat16), sliding_window=window, softcap=softcap)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_dropout_keeps_the_mean(softcap: float | None) -> None:
    """Weights are dropped with the probability asked for and the rest scaled up."""
    torch.manual_seed(0)
    query, key, _ = inputs(4)
    value = torch.ones_like(key)
    outputs = torch.stack([packed([query, key, value], dropout=0.25, softcap=softcap) for _ in range(400)])
    assert outputs.mean().item() == pytest.approx(1, abs=0.01)
    first = outputs[:, 0, 0]  # sees itself alone: dropped, or scaled by 1 / 0.75
    assert (first == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert first.max().item() == pytest.approx(4 / 3)


def test_without_a_layout_it_is_transformers_sdpa() -> None:
    tensors = inputs(2, torch.float32)
    module = nn.Module()
    module.num_key_value_groups = 2
    causal = allowed(None)[None, None]
    output, _ = packed_attention(module, *tensors, causal, scaling=SCALE)
    torch.testing.assert_close(output, dense(*tensors, None, None), rtol=1e-5, atol=1e-5)


def test_capped_scores_without_a_layout() -> None:
    """Generation and plain forwards: all tokens at once, under a mask, and one token after those in the cache."""
    query, key, value = inputs(2, torch.float32)
    expected = dense(query, key, value, None, 3.0)
    at_once, _ = packed_attention(nn.Module(), query, key, value, None, scaling=SCALE, softcap=3.0)
    masked, _ = packed_attention(nn.Module(), query, key, value, allowed(None)[None, None], scaling=SCALE, softcap=3.0)
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)
    last, _ = packed_attention(nn.Module(), query[:, :, -1:], key, value, None, scaling=SCALE, softcap=3.0)
    torch.testing.assert_close(last, at_once[:, -1:], rtol=1e-5, atol=1e-5)


def test_registered_under_its_own_name() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    register()
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention
    assert ALL_MASK_ATTENTION_FUNCTIONS[PACKED_ATTENTION] is sdpa_mask


def test_masks_are_gone_with_the_pass_that_wanted_them() -> None:
    """A step's batches are held to its end, and with each as many tokens squared would be."""
    policy = open_policy(tiny_model("mistral"))  # a window of 5
    for is_trained in (False, True):
        batch = random_batch([20, 9])
        with torch.set_grad_enabled(is_trained):
            logps = policy(batch, Needs()).logp_R
        assert not batch.layout.made
        if is_trained:
            logps.sum().backward()
            assert not batch.layout.made


def test_all_layers_have_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = attention.scaled_dot_product_attention

    def watched(*given: Any, **options: Any) -> Any:
        if "attn_mask" in options:
            seen.append(id(options["attn_mask"]))
        return inner(*given, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    with native.without_kernels():
        policy = open_policy(tiny_model("mistral"))
        seen.clear()
        policy(random_batch([20, 20]), Needs())
    assert len(seen) == 4
    assert len(set(seen)) == 1
