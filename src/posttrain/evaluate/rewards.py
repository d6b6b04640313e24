"""Can a reward model's scores be trusted? Over held-out pairs: how well its confidence is calibrated, and how far its
scores only follow the length of an answer.

`calibration_error`: pairs are binned by how sure the model is of the answer it prefers, `sigmoid(|difference|)`; the
mean gap to how often it is right, weighed by the bins' sizes (expected calibration error, arXiv 1706.04599).
`length_correlation`: Pearson's between an answer's score and its number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from posttrain.data.planning import Packing, plan
from posttrain.types import Batch, Needs, Outputs, Sample

BINS = 10


@torch.no_grad()
def score_pairs(
    forward: Callable[[Batch, Needs], Outputs], samples: Sequence[Sample], token_budget: int, packing: Packing
) -> np.ndarray:
    """`(P, 2)`: of the chosen answer and the rejected one of each pair, a sample of its own."""
    scores: dict[int, list[float]] = {}
    for batch in plan(samples, token_budget, packing):
        score_S = forward(batch, Needs()).score_S
        assert score_S is not None
        for sample, score in zip(batch.sample_S, score_S.tolist(), strict=True):
            scores.setdefault(sample, []).append(score)
    return np.array([scores[index] for index in range(len(samples))])


def judge_scores(score_P2: np.ndarray, samples: Sequence[Sample]) -> dict[str, float]:
    length_P2 = np.array([[len(branch.ids) for branch in sample[0].branches] for sample in samples])
    return {
        "calibration_error": calibration_error(score_P2[:, 0] - score_P2[:, 1]),
        "length_correlation": correlation(score_P2.ravel(), length_P2.ravel()),
    }


def calibration_error(difference_P: np.ndarray) -> float:
    """Given by how much the chosen answer scores higher."""
    sure_P = 1 / (1 + np.exp(-np.abs(difference_P)))  # between a half and one
    right_P = difference_P > 0
    bin_P = np.minimum(((sure_P - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(right_P[bin_P == i].mean() - sure_P[bin_P == i].mean()) * (bin_P == i).mean() for i in set(bin_P)]
    return float(sum(gaps))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; 0 where either never changes."""
    if one.std() == 0 or other.std() == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])
