"""How the backward pass of attention is dealt out to threads.

A thread does a part of a family for one key head. A family is a segment that others continue, its head, with those of
them that nothing continues; or a segment that stands alone. What parts make of the gradients of what their segments
continue, their shares, is added up at the end, in their order. How a family is cut depends on nothing but the family,
so that its sums have the same order on every machine and beside any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from posttrain.types import Layout

COST = 2**14
"""Of a part, pairs of tokens (128 squared): finer parts would only take more memory."""
PARTS = 16
"""Of one family, at most."""
SHARES = 2
"""Of a family's tokens, so many times as many at most have a place in the shares of its parts."""


class Dealt(NamedTuple):
    """`segments_S5`, int32: where a segment starts, its length, its parent's index or -1, how many tokens it continues,
    and the number of its part. `shares`: tokens that have a place in the parts' shares."""

    segments_S5: torch.Tensor
    num_parts: int
    shares: int


def deal(layout: Layout) -> Dealt:
    """Raises ValueError for a segment that stands before its parent."""
    if "dealt" not in layout.made:
        layout.made["dealt"] = _deal(layout)
    return layout.made["dealt"]


@dataclass
class _Family:
    """A head, by its index, and the others; `size` are their tokens, with all that the head sees."""

    head: int
    size: int
    cost: int
    others: list[int] = field(default_factory=list)


def _deal(layout: Layout) -> Dealt:
    parents: Sequence[int] = layout.parents or (-1,) * len(layout.starts)
    for index, parent in enumerate(parents):
        if parent >= index:
            raise ValueError(f"a native kernel was given segment {index} before its parent, {parent}")
    lengths, seen = layout.lengths, layout.context_lengths
    costs = [n * (2 * s - n) // 2 for n, s in zip(lengths, seen, strict=True)]
    continued = set(parents)
    families: dict[int, _Family] = {}
    for index, parent in enumerate(parents):
        if parent < 0 or index in continued:
            families[index] = _Family(index, seen[index], costs[index])
        else:
            family = families[parent]
            family.others.append(index)
            family.size += lengths[index]
            family.cost += costs[index]
    num_parts, shares, numbers = 0, 0, [0] * len(parents)
    for family in families.values():
        most = min(-(-family.cost // COST), PARTS, SHARES * family.size // max(seen[family.head], 1))
        parts = _cut(family, costs, max(1, most))
        for index, part in zip((family.head, *family.others), parts, strict=True):
            numbers[index] = num_parts + part
        num_parts += parts[-1] + 1
        if family.head in continued:
            shares += (parts[-1] + 1) * seen[family.head]
    before = (s - n for s, n in zip(seen, lengths, strict=True))
    rows = zip(layout.starts, lengths, parents, before, numbers, strict=True)
    return Dealt(torch.tensor(list(rows), dtype=torch.int32).reshape(-1, 5), num_parts, shares)


def _cut(family: _Family, costs: Sequence[int], most: int) -> list[int]:
    """The parts of the head and the others, one after the other, of about equal cost."""
    parts, done, left = [0], costs[family.head], family.cost  # what the latest has, and what it and all later ones have
    for index in family.others:
        later = most - parts[-1]
        is_full = later > 1 and done + costs[index] / 2 > left / later
        if is_full:
            left, done = left - done, 0
        done += costs[index]
        parts.append(parts[-1] + is_full)
    return parts
