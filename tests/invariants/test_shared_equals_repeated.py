"""A prompt computed once for all its answers gives what it gives when it is repeated before each: log-probabilities and
every gradient, for every family, state outside attention included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from posttrain.data.planning import Packing, plan
from posttrain.models.forward import open_policy
from posttrain.models.precision import MixedPrecision
from posttrain.models.segment_attention import MAX_LENGTH, segment_attention
from posttrain.types import Batch, Branch, Layout, Needs, Origin, Sample, Tokenized
from tests.invariants.test_packed_equals_plain import OTHERS, family_model
from tests.tiny_models import FAMILIES, VOCABULARY

# prefix, and its branches: shorter than a convolution's reach, longer than a sliding window, one alone, a group
SHAPES = [(1, (3, 1)), (9, (4, 7)), (2, (12, 2)), (0, (5, 6)), (6, (3,)), (4, (2, 3, 1, 5))]


def samples(seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    return [
        (
            Tokenized(
                random.integers(3, VOCABULARY, prefix),
                tuple(Branch(random.integers(3, VOCABULARY, n), np.ones(n, dtype=bool)) for n in lengths),
                Origin("pairs", row),
            ),
        )
        for row, (prefix, lengths) in enumerate(SHAPES)
    ]


def batches() -> tuple[Batch, Batch]:
    (shared,), (repeated,) = (plan(samples(), 10**6, Packing(shared=one)) for one in (True, False))
    assert shared.layout.is_shared
    assert shared.num_tokens < repeated.num_tokens
    assert torch.equal(shared.target_R, repeated.target_R)
    assert torch.equal(shared.sequence_R, repeated.sequence_R)
    return shared, repeated


def result(policy: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logp_R = policy(batch, Needs()).logp_R
    (logp_R * torch.linspace(-1, 2, len(logp_R))).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return logp_R.detach(), found


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    largest = max(gradient.norm() for gradient in other[1].values())
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= tolerance * other[1][name].norm() + 1e-7 * largest, name


def lora(model: nn.Module) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return adapted


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_family(family: str, adapted: bool) -> None:
    model = family_model(family)
    policy = open_policy(lora(model) if adapted else model)
    assert policy.is_packed
    assert policy.shares_prompts
    shared, repeated = batches()
    assert_same(result(policy, shared), result(policy, repeated), 1e-5)


def beginning_alike() -> tuple[Batch, Batch]:
    """Two families and one that is alone. Of the first family are prompts with several answers as well, two of them the
    same."""
    random = np.random.default_rng(1)
    openings = [random.integers(3, VOCABULARY, n) for n in (9, 12)]
    made: list[Sample] = []
    for row, (opening, length) in enumerate([(0, 4), (1, 1), (0, 12), (0, 1), (1, 6), (None, 5)]):
        before = random.integers(3, VOCABULARY, 0) if opening is None else openings[opening]
        ids = np.concatenate([before, random.integers(3, VOCABULARY, length)])
        cut = min(row % 3 * 4, len(ids) - 1)  # of the prompt: at times within the beginning
        supervised = (random.random(len(ids)) < 0.7) & (np.arange(len(ids)) >= len(before))
        branch = Branch(ids[cut:], supervised[cut:])
        made.append((Tokenized(ids[:cut], (branch,), Origin("alike", row)),))
    for row, lengths in enumerate([(5, 2), (5, 2, 1)]):
        prompt = np.concatenate([openings[0], random.integers(3, VOCABULARY, 2)])
        branches = tuple(Branch(random.integers(3, VOCABULARY, n), np.ones(n, dtype=bool)) for n in lengths)
        made += [(Tokenized(prompt, branches, Origin("answers", row)),)] * (2 - row)
    packings = Packing(beginnings=True), Packing(shared=False)
    (shared,), (repeated,) = (plan(made, 10**6, one) for one in packings)
    assert shared.layout.parents == (-1, 0, -1, 2, 0, 0, 2, -1, 0, 8, 8, 0, 11, 11, 0, 14, 14, 14)
    assert shared.num_tokens == repeated.num_tokens - 5 * 9 - 12 - 2 * 11 - 2 * 11
    assert (shared.sequence_tokens, shared.counts) == (repeated.num_tokens, repeated.counts)
    assert torch.equal(shared.target_R, repeated.target_R)
    assert torch.equal(shared.sequence_R, repeated.sequence_R)
    return shared, repeated


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_what_samples_begin_with_alike(family: str, adapted: bool) -> None:
    model = family_model(family)
    policy = open_policy(lora(model) if adapted else model)
    shared, repeated = beginning_alike()
    assert_same(result(policy, shared), result(policy, repeated), 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_in_float64_they_are_equal_to_rounding(family: str) -> None:
    policy = open_policy(family_model(family).double())
    shared, repeated = batches()
    assert_same(result(policy, shared), result(policy, repeated), 1e-11)


@pytest.mark.parametrize("family", ["llama", "lfm2", "mistral"])
def test_in_bf16_within_its_noise(family: str) -> None:
    """Short segments go through batched products there."""
    model = family_model(family)
    MixedPrecision(model, torch.bfloat16, set())
    policy = open_policy(model)
    shared, repeated = batches()
    one, other = result(policy, shared), result(policy, repeated)
    torch.testing.assert_close(one[0], other[0], rtol=0.03, atol=0.1)


def test_a_family_that_cannot_share_repeats_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = family_model("lfm2")
    from posttrain.models import capabilities

    original = capabilities._earlier
    try:
        capabilities._earlier = lambda back, layout: torch.full((layout.num_tokens,), layout.num_tokens)  # forgets all
        policy = open_policy(model)
        assert policy.is_packed
        assert not policy.shares_prompts
        assert "repeats the prompt" in caplog.text
    finally:
        capabilities._earlier = original


def test_attention_of_children_by_products_has_the_gradients_of_a_plain_one() -> None:
    layout = Layout((0, 3, 8, 10, 14, 15, 17), (3, 5, 2, 4, 1, 2, 3), (-1, 0, 0, -1, 3, 2, 2))
    tokens, scale = layout.num_tokens, 0.3
    torch.manual_seed(0)
    given = [torch.randn(1, heads, tokens, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        sees = torch.zeros(tokens, tokens, dtype=torch.bool)
        for own, before in layout.segments():
            sees[own, own] = torch.ones(own.stop - own.start, own.stop - own.start).tril().bool()
            for part in before:
                sees[own, part] = True
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        weights = (query @ key.mT * scale).masked_fill(~sees, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2)

    weight = torch.randn(1, tokens, 4, 6, dtype=torch.float64)
    results = []
    for attend in (lambda *x: segment_attention(*x, layout, scale), plain):
        out = attend(*given)
        results.append((out, torch.autograd.grad((out * weight).sum(), given)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # a shared key's gradient is summed in fp32


def test_what_is_seen_decides_which_attention_runs() -> None:
    layout = Layout((0, MAX_LENGTH), (MAX_LENGTH, 1), (-1, 0))
    assert layout.max_length == MAX_LENGTH + 1
