"""Batches of random pairs and the log-probabilities of random logits, for tests of losses against slow plain ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from posttrain.data.planning import Packing, plan
from posttrain.models.head import HeadShape, token_logps
from posttrain.types import Batch, Branch, Needs, Origin, Outputs, Sample, Tokenized

VOCABULARY = 11
SHAPES = [(3, (4, 2)), (1, (1, 5)), (5, (3, 3)), (2, (6, 1)), (4, (2, 4))]
"""Tokens of a prompt and of its two answers."""


def pair_samples(columns: tuple[str, ...] = ("ref_logp",), seed: int = 0) -> list[Sample]:
    """Pairs with a reference's log-probabilities, and labels or margins where asked."""
    random = np.random.default_rng(seed)
    made: list[Sample] = []
    for row, (prefix, lengths) in enumerate(SHAPES):
        branches = tuple(Branch(random.integers(0, VOCABULARY, n), np.ones(n, dtype=bool)) for n in lengths)
        values: dict[str, Any] = {
            "ref_logp": [random.normal(-2.5, 0.3, n) for n in lengths],
            "label": row % 3 > 0,
            "margin": float(random.normal()),
        }
        kept = {name: values[name] for name in columns}
        made.append((Tokenized(random.integers(0, VOCABULARY, prefix), branches, Origin("pairs", row), kept),))
    return made


def pair_batch(columns: tuple[str, ...] = ("ref_logp",), prompts: bool = False, seed: int = 0) -> Batch:
    """All of them in one batch, the reference in float64."""
    samples = pair_samples(columns, seed)
    (batch,) = plan(samples, 10**6, Packing(columns=columns, prompts=prompts))
    if "ref_logp" in columns:
        exact = np.concatenate([values for (pair,) in samples for values in pair.columns["ref_logp"]])
        batch = replace(batch, columns={**batch.columns, "ref_logp_R": torch.from_numpy(exact)})
    return batch


def random_logits(batch: Batch, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(batch.rows_R), VOCABULARY)
    return (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def outputs_of(z_RV: torch.Tensor, batch: Batch, needs: Needs) -> Outputs:
    """What the engine makes of logits: an identity matrix is the head's weight."""
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    return token_logps(z_RV, identity, None, batch.target_R, HeadShape(), needs)


def answers(z_RV: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """Of every sequence, the log-probabilities of its tokens, one by one from a plain soft-max."""
    found: list[list[torch.Tensor]] = [[] for _ in range(batch.num_sequences)]
    for row, (target, sequence) in enumerate(zip(batch.target_R.tolist(), batch.sequence_R.tolist(), strict=True)):
        p_V = z_RV[row].exp() / z_RV[row].exp().sum()
        found[sequence].append(p_V[target].log())
    return [torch.stack(values) if values else z_RV.new_zeros(0) for values in found]


def references(batch: Batch) -> list[torch.Tensor]:
    return [batch.columns["ref_logp_R"][batch.sequence_R == index] for index in range(batch.num_sequences)]
