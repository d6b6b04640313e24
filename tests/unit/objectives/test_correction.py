"""Weights for samplers that are not quite the policy, against numbers made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.objectives.correction import Correction
from posttrain.types import Batch, Layout, Origin

RATIOS = [2.0, 0.5, 4.0, 1.0, 0.1]
"""Of policy to sampler, for the tokens of two sequences: three, and two of which one was never said."""


def batch(**columns: torch.Tensor) -> Batch:
    return Batch(
        input_ids_T=torch.zeros(5, dtype=torch.long),
        position_ids_T=torch.arange(5),
        layout=Layout((0, 3), (3, 2)),
        rows_R=torch.arange(5),
        target_R=torch.zeros(5, dtype=torch.long),
        sequence_R=torch.tensor([0, 0, 0, 1, 1]),
        sample_S=(0, 1),
        origins_S=(Origin("", 0),) * 2,
        counts={"tokens": 5, "sequences": 2},
        columns=columns,
    )


def weights(mode: str, least: float | None, most: float | None) -> tuple[list[float], Any]:
    sampled = -torch.tensor(RATIOS).log()
    sampled[3] = math.nan
    found, metrics = Correction(mode, least, most)(torch.zeros(5), batch(sampled_logp_R=sampled))
    return [round(value, 5) for value in found.tolist()], metrics


@pytest.mark.parametrize(
    ("mode", "least", "most", "expected"),
    [
        ("token_truncate", None, 3.0, [2, 0.5, 3, 1, 0.1]),
        ("token_truncate", 0.3, None, [2, 0.5, 4, 1, 0.3]),
        ("token_mask", 0.3, 3.0, [2, 0.5, 0, 1, 0]),
        ("sequence_truncate", None, 3.0, [3, 3, 3, 0.1, 0.1]),
        ("sequence_mask", None, 3.0, [0, 0, 0, 0.1, 0.1]),
        ("sequence_mask", 0.2, 5.0, [4, 4, 4, 0, 0]),
    ],
)
def test_ratios_are_bounded(mode: str, least: float | None, most: float | None, expected: list[float]) -> None:
    assert weights(mode, least, most)[0] == pytest.approx(expected)


def test_what_is_logged() -> None:
    _, metrics = weights("token_mask", 0.3, 3.0)
    total, count = metrics["sampling/importance_sampling_ratio/mean"]
    assert float(total) / count == pytest.approx(3.5 / 5)
    assert float(metrics["sampling/importance_sampling_ratio/max"][0]) == 2


def test_bounds_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        Correction("tokens")
    with pytest.raises(ConfigError, match="must be below"):
        Correction("token_mask", 3.0, 2.0)
    with pytest.raises(ConfigError, match="truncates to no bound"):
        Correction("token_truncate", None, None)


def test_a_sampler_that_has_said_nothing() -> None:
    with pytest.raises(ConfigError, match="rollout_func gave no logprobs"):
        Correction()(torch.zeros(5), batch())
