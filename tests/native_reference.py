"""What the native kernels should give, in float64 and step by step; and how far they are from it."""

from __future__ import annotations

import pytest
import torch

from posttrain import native
from posttrain.native.kernels import Kernels
from posttrain.types import Layout

TOLERANCE = 4e-3
"""Of norms in bf16: a rounding moves a number by up to 1/256 of itself, and on average by a third of that."""
OF_FP32 = 2e-6

_dtype = torch.bfloat16


def native_dtype() -> torch.dtype:
    """What is being tested; the fixture `each_native_dtype` goes through all there are."""
    return _dtype


def kernels_or_skip() -> Kernels:
    kernels = native.kernels(_dtype)
    if kernels is None:
        pytest.skip("no native kernels here: another processor, no C++ compiler, or POSTTRAIN_NATIVE=0")
    return kernels


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).to(_dtype)


def assert_near(seen: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """`tolerance` is that of bf16; of fp32 it is as many times its own usual one, or that."""
    if _dtype == torch.float32:
        tolerance = max(1.0, tolerance / TOLERANCE) * OF_FP32
    assert seen.shape == expected.shape
    error = (seen.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"{error:.2e} apart"


def rotated(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    low, high = x_THE.chunk(2, -1)
    return x_THE * cos_TE[:, None] + torch.cat([-high, low], -1) * sin_TE[:, None]


def attended(
    query_THE: torch.Tensor,
    key_TKE: torch.Tensor,
    value_TKE: torch.Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the log of the sum of each query's exponentials `(H, T)`."""
    repeats = query_THE.shape[1] // key_TKE.shape[1]
    key_THE, value_THE = (x.repeat_interleave(repeats, 1) for x in (key_TKE, value_TKE))
    outputs, sums = [], []
    for own, before in layout.segments():
        keys, values = (torch.cat([x[part] for part in (*before, own)]) for x in (key_THE, value_THE))
        score_HNM = torch.einsum("nhe,mhe->hnm", query_THE[own], keys) * scale
        asked, there = score_HNM.shape[1:]
        distance_NM = torch.arange(there - asked, there)[:, None] - torch.arange(there)
        hidden_NM = (distance_NM < 0) | (distance_NM >= (window or there))
        score_HNM = score_HNM.masked_fill(hidden_NM, -torch.inf)
        outputs.append(torch.einsum("hnm,mhe->nhe", score_HNM.softmax(-1), values))
        sums.append(score_HNM.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, 1)


def laid_end_to_end(lengths: tuple[int, ...], parents: tuple[int, ...] = ()) -> Layout:
    return Layout(tuple(sum(lengths[:i]) for i in range(len(lengths))), lengths, parents)
