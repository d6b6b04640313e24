"""LoRA's slim products: the kernels say what float64 says, and the twins agree."""

from __future__ import annotations

import pytest
import torch

from posttrain import native
from posttrain.models.low_rank import add_gradient, add_update, factor_gradient, low_factors

SHAPES = [(1, 16, 16, 16), (47, 32, 48, 16), (97, 576, 192, 8), (200, 64, 528, 40), (3, 48, 16, 1)]


def close(seen: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((seen.double() - expected).norm() <= 6e-3 * expected.norm())


@pytest.mark.skipif(native.kernels(torch.bfloat16) is None, reason="no native kernels for bf16 on this machine")
@pytest.mark.parametrize(("tokens", "width", "out", "rank"), SHAPES)
def test_products_of_an_update(tokens: int, width: int, out: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, y, grad, grad_x = (random(tokens, n).to(torch.bfloat16) for n in (width, out, out, width))
    a, b = low_factors(random(rank, width), random(out, rank), 0.5, x)
    assert len(a) % 16 == 0
    a64, b64, x64, grad64 = (one.double() for one in (a, b, x, grad))
    inner64 = (x64 @ a64.T).to(torch.bfloat16).double()
    inner_grad64 = (grad64 @ b64).to(torch.bfloat16).double()
    expected, expected_grad = y.double() + inner64 @ b64.T, grad_x.double() + inner_grad64 @ a64
    inner, inner_grad = add_update(y, x, a, b), add_gradient(grad_x, grad, a, b)
    assert close(y, expected)
    assert close(grad_x, expected_grad)
    assert close(inner, inner64)
    assert close(inner_grad, inner_grad64)
    for left, right in ((inner_grad, x), (inner, grad)):
        sums = factor_gradient(left, right, rank)
        assert sums.shape == (rank, right.shape[1])
        assert close(sums, (left.double().T @ right.double())[:rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 50])
def test_the_same_without_kernels(dtype: torch.dtype, width: int) -> None:
    """Widths that are no multiple of 16 too."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(20, n, generator=generator).to(dtype) for n in (width, 32))
    a, b = torch.randn(4, width, generator=generator), torch.randn(32, 4, generator=generator)

    def everything() -> list[torch.Tensor]:
        y, grad_x = torch.zeros(20, 32, dtype=dtype), torch.zeros(20, width, dtype=dtype)
        low_a, low_b = low_factors(a, b, 2.0, x)
        inner, inner_grad = add_update(y, x, low_a, low_b), add_gradient(grad_x, grad, low_a, low_b)
        return [y, grad_x, factor_gradient(inner_grad, x, 4), factor_gradient(inner, grad, 4)]

    with native.without_kernels():
        expected = everything()
    for seen, wanted in zip(everything(), expected, strict=True):
        assert (seen.double() - wanted.double()).norm() <= 1e-2 * wanted.double().norm()
