"""Which sequences come into one micro-batch: none larger than the budget, and all as equal as they can be.

Sequences go longest first into the emptiest of as many groups as are needed. Equal ones need the least memory, for it
is the largest that counts, and take the least time when processes wait for one another. If that does not fit, first-fit
decreasing, which wastes less space, is used. What sequences begin with alike counts once in a group; it is tried as
well whether fewer groups will do where those of a family go one after the other.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.data.beginnings import Beginning

NEAR = 2
"""So many fewer groups than first-fit decreasing found are tried."""


@dataclass(frozen=True)
class Piece:
    """Of `size` tokens, its beginning included, which `seers` of its segments see."""

    size: int
    beginning: Beginning | None = None
    seers: int = 1

    @property
    def own(self) -> int:
        """Without its beginning."""
        return self.size - (self.beginning.length if self.beginning else 0)

    @property
    def repeated(self) -> int:
        """Tokens of its beginning, as often as they are seen."""
        return self.beginning.length * self.seers if self.beginning else 0


@dataclass(frozen=True)
class _Bounds:
    """Of tokens in a group, and of those of beginnings as often as they are seen."""

    total: int
    repeated: float


@dataclass
class _Group:
    total: int = 0
    repeated: int = 0
    families: set[int] = field(default_factory=set)
    pieces: list[int] = field(default_factory=list)

    def with_it(self, piece: Piece) -> int:
        """The total, were it added."""
        known = piece.beginning is not None and piece.beginning.family in self.families
        return self.total + (piece.own if known else piece.size)

    def takes(self, piece: Piece, most: _Bounds) -> bool:
        """What is alone in its group may be as it is."""
        return not self.pieces or (
            self.with_it(piece) <= most.total and self.repeated + piece.repeated <= most.repeated
        )

    def is_within(self, most: _Bounds) -> bool:
        return len(self.pieces) == 1 or (self.total <= most.total and self.repeated <= most.repeated)

    def add(self, index: int, piece: Piece) -> None:
        self.total = self.with_it(piece)
        self.repeated += piece.repeated
        self.pieces.append(index)
        if piece.beginning is not None:
            self.families.add(piece.beginning.family)


def group(pieces: Sequence[Piece], budget: int, repeats: float = math.inf) -> list[list[int]]:
    """Indices of `pieces` in groups that stay within the budget; one that alone is larger has a group of its own.
    Beginnings are seen by so many tokens at most that, were they repeated, they would be `repeats` budgets."""
    pieces = [piece if piece.size <= budget else Piece(budget) for piece in pieces]
    most = _Bounds(budget, repeats * budget)
    by_size = sorted(range(len(pieces)), key=lambda i: -pieces[i].size)
    by_family = _together(pieces)
    orders = [by_size] if by_size == by_family else [by_size, by_family]
    groups, order = min(((_first_fit(pieces, order, most), order) for order in orders), key=lambda one: len(one[0]))
    for number in range(max(1, _fewest(pieces, budget), len(groups) - NEAR), len(groups) + 1):
        balanced = _balanced(pieces, order, number)
        if all(one.is_within(most) for one in balanced):
            groups = balanced
            break
    return sorted(sorted(one.pieces) for one in groups if one.pieces)


def _together(pieces: Sequence[Piece]) -> list[int]:
    """The longest first, and with it all of its family."""
    longest: dict[int, int] = defaultdict(int)
    for piece in pieces:
        if piece.beginning:
            longest[piece.beginning.family] = max(longest[piece.beginning.family], piece.size)

    def rank(index: int) -> tuple[int, int, int]:
        piece = pieces[index]
        if piece.beginning is None:
            return -piece.size, -1, 0
        return -longest[piece.beginning.family], piece.beginning.family, -piece.size

    return sorted(range(len(pieces)), key=rank)


def _fewest(pieces: Sequence[Piece], budget: int) -> int:
    lengths = {piece.beginning.family: piece.beginning.length for piece in pieces if piece.beginning}
    return math.ceil((sum(piece.own for piece in pieces) + sum(lengths.values())) / budget)


def _first_fit(pieces: Sequence[Piece], order: list[int], most: _Bounds) -> list[_Group]:
    groups: list[_Group] = []
    for index in order:
        fit = next((one for one in groups if one.takes(pieces[index], most)), None)
        if fit is None:
            fit = _Group()
            groups.append(fit)
        fit.add(index, pieces[index])
    return groups


def _balanced(pieces: Sequence[Piece], order: list[int], number: int) -> list[_Group]:
    """Each into the group that is the emptiest with it: of all, or of those that have its beginning already."""
    groups = [_Group() for _ in range(number)]
    everywhere = [(0, i) for i in range(number)]
    of_family: dict[int, list[tuple[int, int]]] = defaultdict(list)  # the groups that have it: totals, and numbers
    for index in order:
        piece = pieces[index]
        candidates = [_emptiest(everywhere, groups)]
        if piece.beginning is not None and (known := of_family[piece.beginning.family]):
            candidates.insert(0, _emptiest(known, groups))
        chosen = min(candidates, key=lambda i: groups[i].with_it(piece))
        is_new = piece.beginning is not None and piece.beginning.family not in groups[chosen].families
        groups[chosen].add(index, piece)
        if is_new and piece.beginning is not None:
            heapq.heappush(of_family[piece.beginning.family], (groups[chosen].total, chosen))
    return groups


def _emptiest(heap: list[tuple[int, int]], groups: list[_Group]) -> int:
    """A group's total in the heap is what it once was, and no more than what it is."""
    while heap[0][0] != groups[heap[0][1]].total:
        heapq.heapreplace(heap, (groups[heap[0][1]].total, heap[0][1]))
    return heap[0][1]
