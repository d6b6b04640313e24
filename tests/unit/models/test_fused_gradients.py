"""Attention through the native kernels, as autograd sees it: gradients against those of float64, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain import native
from posttrain.models import fused_attention as fused
from posttrain.models.fused_attention import fused_attention
from posttrain.models.lean_layers import specialise_layers
from posttrain.types import Layout
from tests.native_reference import assert_near, attended, laid_end_to_end, native_dtype, random, rotated
from tests.tiny_models import SIZES, VOCABULARY

pytestmark = pytest.mark.usefixtures("kernels")
LAYOUT = laid_end_to_end((12, 5, 30, 1), (-1, 0, -1, -1))


def heads(layout: Layout = LAYOUT, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values that learn, heads first as transformers has them."""
    shapes = ((4, 0), (2, 1), (2, 2))
    query, key, value = (random(layout.num_tokens, n, size, seed=seed).transpose(0, 1)[None] for n, seed in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def by_token(x_1HTE: torch.Tensor) -> torch.Tensor:
    return x_1HTE[0].transpose(0, 1)


GRADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda out: (out.float() * random(*out.shape, seed=9).float()).sum(),
    "one number for all": lambda out: out.sum(),
    "turned round": lambda out: (
        out.permute(0, 3, 2, 1).contiguous() * random(*out.shape[:1], *out.shape[:0:-1])
    ).sum(),
}


@pytest.mark.parametrize("loss", GRADS.values(), ids=GRADS)
def test_gradients_of_any_strides(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = heads()
    out = fused_attention(*given, LAYOUT, 0.25)
    seen = torch.autograd.grad(loss(out), given)
    exact = tuple(one.detach().double().requires_grad_() for one in given)
    expected = attended(*(by_token(one) for one in exact), LAYOUT, 0.25)[0][None]
    assert_near(out.detach(), expected.detach())
    grads = torch.autograd.grad(loss(expected), exact)
    for one, other in zip(seen, grads, strict=True):
        assert_near(one, other, 6e-3)


def test_turned_first() -> None:
    query, key, value = (by_token(one.detach()).contiguous().requires_grad_() for one in heads())
    angle = random(LAYOUT.num_tokens, 16, seed=5).float()
    turns = angle.cos().to(query), angle.sin().to(query)
    grad = random(*query.shape, seed=6)
    out = fused._FusedAttention.apply(query, key, value, turns, LAYOUT, 0.25, None)
    seen = torch.autograd.grad(out, (query, key, value), grad)
    exact = tuple(one.detach().double().requires_grad_() for one in (query, key, value))
    exact_turns = tuple(one.double() for one in turns)
    expected, _ = attended(rotated(exact[0], *exact_turns), rotated(exact[1], *exact_turns), exact[2], LAYOUT, 0.25)
    assert_near(out.detach(), expected.detach(), 6e-3)
    for one, other in zip(seen, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_near(one, other, 8e-3)


def test_numbers_at_odd_places_are_copied() -> None:
    given = heads()
    expected = fused_attention(*given, LAYOUT, 0.25)
    odd = []
    for one in given:
        room = torch.empty(one.numel() + 1, dtype=native_dtype())[1:]
        odd.append(room.view(by_token(one).shape).copy_(by_token(one.detach())).transpose(0, 1)[None])
    assert odd[0].data_ptr() % 4 == native_dtype().itemsize % 4
    assert torch.equal(fused_attention(*odd, LAYOUT, 0.25), expected)
    assert fused._readable(by_token(odd[0])).data_ptr() % 4 == 0


@pytest.mark.parametrize("which", ["attention", "turned", "norm", "gated"])
def test_a_second_derivative_is_refused(which: str) -> None:
    x = random(LAYOUT.num_tokens, 64).requires_grad_()
    if which in ("attention", "turned"):
        q = (x * 1).view(-1, 4, 16)
        turns = (torch.ones(len(x), 16).to(x),) * 2 if which == "turned" else None
        out = fused._FusedAttention.apply(q, q, q, turns, LAYOUT, 0.25, None)
    else:
        config = LlamaConfig(vocab_size=VOCABULARY, **{**SIZES, "hidden_size": 64, "num_hidden_layers": 1})
        layer: Any = LlamaForCausalLM(config).to(native_dtype()).model.layers[0]
        assert specialise_layers(layer)
        out = layer.input_layernorm(x) if which == "norm" else layer.mlp(x)
    (grad,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().square().sum().backward()


@pytest.mark.parametrize("which", range(5), ids=("query", "key", "value", "cosines", "sines"))
def test_inputs_changed_before_the_backward_pass_are_noticed(which: int) -> None:
    query, key, value = (by_token(one.detach()).contiguous() for one in heads())
    turns = (torch.ones(LAYOUT.num_tokens, 16).to(query), torch.zeros(LAYOUT.num_tokens, 16).to(query))
    used = query.clone().requires_grad_()
    given = [query, key, value, *turns]
    plain = None if which < 3 else turns
    out = fused._FusedAttention.apply(
        used * 1 if which else query.requires_grad_(), key, value, plain, LAYOUT, 0.25, None
    )
    with torch.no_grad():
        given[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_switching_off_between_the_passes_changes_nothing() -> None:
    given = heads()
    expected = torch.autograd.grad(fused_attention(*given, LAYOUT, 0.25).sum(), given)
    out = fused_attention(*given, LAYOUT, 0.25)
    with native.without_kernels():
        seen = torch.autograd.grad(out.sum(), given)
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_inference_and_no_gradients() -> None:
    given = heads()
    expected = fused_attention(*given, LAYOUT, 0.25)
    with torch.no_grad():
        assert torch.equal(fused_attention(*given, LAYOUT, 0.25), expected)
    with torch.inference_mode():
        assert torch.equal(fused_attention(*given, LAYOUT, 0.25), expected)


def test_backward_passes_of_other_threads() -> None:
    def gradients(seed: int) -> list[torch.Tensor]:
        query, key, value = (random(48, 2, 32, seed=seed + i).requires_grad_() for i in range(3))
        out = fused._FusedAttention.apply(query, key, value, None, LAYOUT, 0.25, None)
        return list(torch.autograd.grad(out.float().square().sum(), (query, key, value)))

    expected = [gradients(seed) for seed in range(8)]
    with ThreadPoolExecutor(3) as pool:
        seen = list(pool.map(gradients, range(8)))
    for one, other in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
