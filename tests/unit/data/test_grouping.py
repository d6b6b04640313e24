"""Groups of sequences within a budget, where what they begin with alike counts once."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.beginnings import Beginning
from posttrain.data.grouping import Piece, group

OPENING = Beginning(0, 6)


def total(pieces: list[Piece], members: list[int]) -> int:
    families = {one.family: one.length for i in members if (one := pieces[i].beginning)}
    own = sum(pieces[i].size - (one.length if (one := pieces[i].beginning) else 0) for i in members)
    return own + sum(families.values())


def test_what_is_shared_counts_once() -> None:
    pieces = [Piece(8, OPENING)] * 4
    assert group(pieces, 14) == [[0, 1, 2, 3]]  # 6 + 4 * 2
    assert group(pieces, 13) == [[0, 2], [1, 3]]
    assert group([Piece(8)] * 4, 14) == [[0], [1], [2], [3]]


def test_families_stay_together() -> None:
    other = Beginning(1, 6)
    assert group([Piece(8, OPENING), Piece(8, other), Piece(8, OPENING), Piece(8, other)], 10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("length", [6, 10, 600])
def test_those_over_the_budget_are_alone(length: int) -> None:
    """However much of them they have in common."""
    opening = Beginning(0, length)
    assert group([Piece(length + 24, opening), Piece(length + 24, opening), Piece(9)], 10) == [[0], [1], [2]]


def test_repetitions_have_a_limit() -> None:
    """Where attention copies keys for each that sees them."""
    pieces = [Piece(60, Beginning(0, 50))] * 10
    assert group(pieces, 200) == [list(range(10))]
    assert [len(members) for members in group(pieces, 200, 1)] == [4, 3, 3]
    of_answers = [Piece(60, Beginning(0, 50), seers=3)] * 10
    assert [len(members) for members in group(of_answers, 200, 1)] == [1] * 10
    assert [len(members) for members in group(of_answers, 200, 2)] == [2] * 5
    assert group([Piece(60)] * 3, 200, 0) == [[0, 1, 2]]


def test_many_pieces_of_many_families_take_no_time() -> None:
    pieces = [Piece(30 + i % 7, Beginning(i // 2, 20)) for i in range(4000)]
    assert group(pieces, 10**9) == [list(range(4000))]
    assert len(group(pieces, 4096)) == 23  # 22.1 would do


@pytest.mark.parametrize("seed", range(20))
def test_every_piece_once_and_within_the_budget(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, 5)
    pieces = []
    for _ in range(random.integers(1, 120)):
        family = int(random.integers(-1, 5))
        own = int(random.integers(1, 40))
        beginning = Beginning(family, int(lengths[family])) if family >= 0 else None
        pieces.append(Piece(own + (beginning.length if beginning else 0), beginning))
    budget = 100
    groups = group(pieces, budget)
    assert sorted(i for members in groups for i in members) == list(range(len(pieces)))
    assert all(total(pieces, members) <= budget for members in groups)
    assert group(pieces, budget) == groups
    without = group([Piece(piece.size) for piece in pieces], budget)
    assert len(groups) <= len(without)
