"""Samples → micro-batches: sequences end to end, without padding, at most `token_budget` tokens each.

Sequences go longest first into the emptiest of as many micro-batches as are needed. Equal ones need the least memory,
for it is the largest that counts, and take the least time when processes wait for one another; the sum over an
optimiser step does not depend on the cut. If that does not fit, first-fit decreasing, which wastes less space, is used.

Shape suffixes: `T` packed tokens, `R` supervised rows, `S` sequences.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.types import Batch, Branch, Layout, Origin, Sample


@dataclass(frozen=True)
class _Sequence:
    """One branch with its prefix, and which sample it belongs to."""

    prefix: np.ndarray
    branch: Branch
    sample: int
    origin: Origin

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.branch.ids)


def plan(samples: Sequence[Sample], token_budget: int) -> list[Batch]:
    """All sequences of `samples`, each in one batch. One that is longer than the budget has a batch of its own. The
    plan depends on nothing but the arguments; sequences of a batch, and batches, come in the samples' order."""
    sequences = list(_sequences(samples))
    groups = _groups([sequence.length for sequence in sequences], token_budget)
    return [_batch([sequences[i] for i in group]) for group in groups]


def _sequences(samples: Sequence[Sample]) -> Iterator[_Sequence]:
    for index, sample in enumerate(samples):
        for part in sample:
            for branch in part.branches:
                yield _Sequence(part.prefix, branch, index, part.origin)


def _groups(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sums stay within the budget."""
    sizes = [min(length, budget) for length in lengths]
    longest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fitted = _first_fit(sizes, longest_first, budget)
    for num_groups in range(max(1, math.ceil(sum(sizes) / budget)), len(fitted) + 1):
        balanced = _balanced(sizes, longest_first, num_groups)
        if max(sum(sizes[i] for i in group) for group in balanced) <= budget:
            fitted = balanced
            break
    return sorted(sorted(group) for group in fitted if group)


def _balanced(sizes: list[int], order: list[int], num_groups: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    emptiest = [(0, i) for i in range(num_groups)]
    for index in order:
        total, i = heapq.heappop(emptiest)
        groups[i].append(index)
        heapq.heappush(emptiest, (total + sizes[index], i))
    return groups


def _first_fit(sizes: list[int], order: list[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    totals: list[int] = []
    for index in order:
        fit = next((i for i, total in enumerate(totals) if total + sizes[index] <= budget), len(groups))
        if fit == len(groups):
            groups.append([])
            totals.append(0)
        groups[fit].append(index)
        totals[fit] += sizes[index]
    return groups


def _batch(sequences: list[_Sequence]) -> Batch:
    lengths = np.array([sequence.length for sequence in sequences], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    ids_T = np.concatenate([part for s in sequences for part in (s.prefix, s.branch.ids)]).astype(np.int64)
    supervised_T = np.concatenate(
        [part for s in sequences for part in (np.zeros(len(s.prefix), dtype=bool), s.branch.supervised)]
    )
    supervised_T[starts] = False  # nothing comes before a first token that could predict it
    tokens_R = np.flatnonzero(supervised_T)
    sequence_T = np.repeat(np.arange(len(sequences)), lengths)
    return Batch(
        input_ids_T=torch.from_numpy(ids_T),
        position_ids_T=torch.from_numpy(np.arange(len(ids_T)) - np.repeat(starts, lengths)),
        layout=Layout(tuple(starts.tolist()), tuple(lengths.tolist())),
        rows_R=torch.from_numpy(tokens_R - 1),
        target_R=torch.from_numpy(ids_T[tokens_R]),
        sequence_R=torch.from_numpy(sequence_T[tokens_R]),
        sample_S=tuple(sequence.sample for sequence in sequences),
        origins_S=tuple(sequence.origin for sequence in sequences),
        counts={"tokens": len(tokens_R), "sequences": len(sequences)},
    )
