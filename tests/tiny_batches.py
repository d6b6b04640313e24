"""Samples and batches of random tokens, for tests of what computes on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.planning import plan
from posttrain.types import Batch, Branch, Origin, Sample, Tokenized
from tests.tiny_models import VOCABULARY


def random_samples(
    lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY, share: float = 0.7
) -> list[Sample]:
    """One sequence of each length; about `share` of its tokens are supervised, its first token never."""
    generator = np.random.default_rng(seed)
    samples = []
    for row, length in enumerate(lengths):
        ids = generator.integers(3, vocabulary, length)
        supervised = generator.random(length) < share
        supervised[:1] = False
        samples.append((Tokenized(ids[:0], (Branch(ids, supervised),), Origin("train", row)),))
    return samples


def random_batch(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY, share: float = 0.7) -> Batch:
    """The same, in one micro-batch."""
    (batch,) = plan(random_samples(lengths, seed, vocabulary, share), token_budget=10**9)
    return batch
