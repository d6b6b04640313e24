"""Tokens are drawn with the probabilities that they have, from numbers that depend on nothing but the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from posttrain import ConfigError
from posttrain.rollout.sampling import Sampling, choose, draw, narrowed

V = 700


def logits(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("seed", range(5))
def test_the_token_into_whose_share_a_number_falls(seed: int) -> None:
    p = logits(40, seed).double().softmax(-1)
    numbers = torch.from_numpy(np.random.default_rng(seed).random(40))
    expected = [
        int(np.searchsorted(np.cumsum(row), u, side="right")) for row, u in zip(p.numpy(), numbers, strict=True)
    ]
    assert draw(p, numbers).tolist() == expected


@pytest.mark.parametrize("number", [0.0, 0.25, 0.999999999999, np.nextafter(1.0, 0.0)])
def test_tokens_without_probability_are_never_drawn(number: float) -> None:
    p = torch.zeros(3, V)
    p[0, 300] = 1.0
    p[1, [0, V - 1]] = 0.5
    p[2, [255, 256]] = torch.tensor([1e-30, 1.0])
    tokens = draw(p, torch.full((3,), number, dtype=torch.float64))
    assert all(p[row, token] > 0 for row, token in enumerate(tokens.tolist()))
    assert tokens[0] == 300


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}]
)
def test_what_is_no_finite_number_shows_in_the_log_probability(options: dict[str, Any], bad: float) -> None:
    """And in that row alone; no index lies beyond the end, which a GPU's process would not survive."""
    z = logits()
    z[1, V // 2] = bad
    token, logp = choose(z, torch.tensor([0.1, 0.5, 0.9]), Sampling(**options))
    assert logp.isfinite().tolist() == [True, False, True]
    assert ((token >= 0) & (token < V)).all()


def test_how_often() -> None:
    p = torch.tensor([[0.5, 0.2, 0.0, 0.3]])
    numbers = torch.arange(1000, dtype=torch.float64) / 1000
    counts = np.bincount(draw(p.expand(1000, 4), numbers).numpy(), minlength=4)
    assert counts == pytest.approx([500, 200, 0, 300], abs=1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_log_probabilities_are_those_of_the_whole_vocabulary(temperature: float) -> None:
    for options in ({}, {"top_k": 5}, {"top_p": 0.5, "min_p": 0.1}):
        token, logp = choose(logits(), torch.tensor([0.1, 0.5, 0.9]), Sampling(temperature=temperature, **options))
        whole = (logits() / temperature).log_softmax(-1)
        assert logp.tolist() == pytest.approx([whole[row, one].item() for row, one in enumerate(token)], abs=1e-5)


def test_no_temperature_takes_the_likeliest() -> None:
    token, logp = choose(logits(), torch.zeros(3), Sampling(temperature=0.0))
    assert token.tolist() == logits().argmax(-1).tolist()
    assert logp.tolist() == pytest.approx(logits().log_softmax(-1).amax(-1).tolist(), abs=1e-5)


def plain(z: np.ndarray, options: dict[str, float]) -> set[int]:
    """The tokens that may be taken, one filter after another."""
    kept = sorted(range(len(z)), key=lambda token: -z[token])
    if k := int(options.get("top_k", 0)):
        kept = kept[:k]
    if (share := options.get("top_p", 1.0)) < 1:
        weights = np.exp(z[kept] - z[kept].max())
        upto = np.cumsum(weights / weights.sum())
        kept = kept[: int(np.searchsorted(upto, share, side="left")) + 1]
    if least := options.get("min_p", 0.0):
        kept = [token for token in kept if np.exp(z[token] - z[kept[0]]) >= least]
    return set(kept)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7},
        {"top_k": 10_000},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.05},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.2},
    ],
)
def test_what_is_left_out(options: dict[str, Any]) -> None:
    for z, kept in zip(logits(6), narrowed(logits(6), Sampling(**options)), strict=True):
        assert set(torch.isfinite(kept).nonzero()[:, 0].tolist()) == plain(z.double().numpy(), options)


def test_what_was_said_is_said_less() -> None:
    z = torch.tensor([[2.0, -1.0, 1.9, 0.0]])
    said = [torch.tensor([0, 1, 0])]
    token, logp = choose(z, torch.zeros(1), Sampling(temperature=0.0, repetition_penalty=1.5), said)
    assert token.tolist() == [2]  # 2.0 has become 1.33
    assert logp.item() == pytest.approx(z.log_softmax(-1)[0, 2].item())


def test_numbers_depend_on_the_seed_and_the_place_alone() -> None:
    one = Sampling(seed=3, max_tokens=50)
    assert (one.numbers(2, 5) == Sampling(seed=3, max_tokens=50).numbers(2, 5)).all()
    assert (Sampling(seed=3, max_tokens=20).numbers(2, 5) == one.numbers(2, 5)[:20]).all()
    others = [one.numbers(2, 4), one.numbers(5, 2), Sampling(seed=4, max_tokens=50).numbers(2, 5)]
    assert all(abs(np.corrcoef(one.numbers(2, 5), other)[0, 1]) < 0.5 for other in others)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_values_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)
