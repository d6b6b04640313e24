"""The kernel that draws tokens, against cumulated probabilities in float64 and against torch's operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain import native
from posttrain.rollout.sampling import Sampling, choose
from tests.native_reference import kernels_or_skip, native_dtype, random

pytestmark = pytest.mark.usefixtures("each_native_dtype")
SHAPES = ((1, 1), (3, 7), (2, 16), (5, 255), (4, 256), (3, 257), (16, 1000), (8, 49152))


@pytest.mark.parametrize(("rows", "count"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_the_token_whose_share_the_number_falls_into(rows: int, count: int, temperature: float) -> None:
    logits = random(rows, count, seed=rows, spread=3.0)
    p = (logits.double() / temperature).softmax(-1)
    upto = p.cumsum(-1)
    draw = torch.Generator().manual_seed(count)
    for edge in (0.0, np.nextafter(1.0, 0.0), None, None, None):
        number = (
            torch.rand(rows, dtype=torch.float64, generator=draw)
            if edge is None
            else torch.full((rows,), edge, dtype=torch.float64)
        )
        token, logp = kernels_or_skip().draw(logits, number, temperature)
        assert ((token >= 0) & (token < count)).all()
        own = p.gather(1, token[:, None])[:, 0]
        assert torch.allclose(logp.double(), own.log(), atol=2e-5)
        end = upto.gather(1, token[:, None])[:, 0]
        assert ((number >= end - own - 1e-6) & (number <= end + 1e-6)).all()


def test_it_draws_what_torch_draws() -> None:
    """But where a number falls within a rounding of the border between two tokens."""
    kernels_or_skip()
    logits, numbers = (
        random(64, 49152, spread=4.0),
        torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    for options in ({}, {"temperature": 0.8}):
        token, logp = choose(logits, numbers, Sampling(**options))
        with native.without_kernels():
            other, of_other = choose(logits, numbers, Sampling(**options))
        same = token == other
        assert same.float().mean() > 0.95
        assert torch.allclose(logp[same], of_other[same], atol=1e-4)


def test_neither_threads_nor_neighbours_matter() -> None:
    logits, numbers = random(9, 5000), torch.rand(9, dtype=torch.float64)
    token, logp = kernels_or_skip().draw(logits, numbers, 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row in range(9):
            alone, of_it = kernels_or_skip().draw(logits[row : row + 1], numbers[row : row + 1], 1.0)
            assert alone[0] == token[row]
            assert of_it[0] == logp[row]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 300, 699])
def test_what_is_no_finite_number_shows_in_its_row(bad: float, place: int) -> None:
    logits = random(3, 700)
    whole, _ = kernels_or_skip().draw(logits, torch.tensor([0.1, 0.5, 0.9]), 1.0)
    logits[1, place] = bad
    token, logp = kernels_or_skip().draw(logits, torch.tensor([0.1, 0.5, 0.9]), 1.0)
    assert logp.isfinite().tolist() == [True, False, True]
    assert ((token >= 0) & (token < 700)).all()
    assert token[0] == whole[0]
    assert token[2] == whole[2]
    logits[:] = -torch.inf
    assert not kernels_or_skip().draw(logits, torch.tensor([0.1, 0.5, 0.9]), 1.0)[1].isfinite().any()


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.full((4, 700), -torch.inf, dtype=native_dtype())
    for row, place in enumerate((0, 255, 256, 699)):
        logits[row, place] = 2.0
        logits[row, 300] = 1.0
    for number in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        token, logp = kernels_or_skip().draw(logits, torch.full((4,), number, dtype=torch.float64), 1.0)
        assert all(logits[row, chosen] > 0 for row, chosen in enumerate(token.tolist()))
        assert logp.isfinite().all()


def test_how_often() -> None:
    p = torch.tensor([[0.5, 0.2, 0.0, 0.3]])
    logits = p.log().to(native_dtype()).expand(1000, 4)
    token, _ = kernels_or_skip().draw(logits, torch.arange(1000, dtype=torch.float64) / 1000, 1.0)
    assert np.bincount(token.numpy(), minlength=4) == pytest.approx([500, 200, 0, 300], abs=3)
