"""Which thread does what of attention's backward pass."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.native.dealing import COST, PARTS, SHARES, deal
from posttrain.types import Layout
from tests.native_reference import laid_end_to_end


def parts(layout: Layout) -> list[int]:
    return deal(layout).segments_S5[:, 4].tolist()


def costs(layout: Layout) -> list[float]:
    return [n * (2 * seen - n) / 2 for n, seen in zip(layout.lengths, layout.context_lengths, strict=True)]


def test_segments_stand_with_their_parents_and_parts() -> None:
    layout = laid_end_to_end((200, 100, 5, 90, 6), (-1, 0, -1, 0, 2))
    found = deal(layout)
    assert found.segments_S5.tolist() == [[0, 200, -1, 0, 0], [200, 100, 0, 200, 1], [300, 5, -1, 0, 3],
                                          [305, 90, 0, 200, 2], [395, 6, 2, 5, 3]]  # fmt: skip
    assert (found.num_parts, found.shares) == (4, 3 * 200 + 5)
    assert deal(layout) is found


def test_those_without_children_are_a_part_each() -> None:
    assert parts(laid_end_to_end((3, 4000))) == [0, 1]
    assert deal(laid_end_to_end((3, 4))).shares == 0
    assert deal(Layout((), ())).num_parts == 0


def test_prompts_that_begin_alike_are_families_of_their_own() -> None:
    layout = laid_end_to_end((90, 300, 400, 500, 200, 6, 7, 1), (-1, 0, 1, 1, 0, 4, 4, 0))
    found = deal(layout)
    assert found.segments_S5[:, 3].tolist() == [0, 90, 390, 390, 90, 290, 290, 90]
    assert parts(layout) == [0, 1, 2, 3, 4, 5, 5, 0]  # the last is mostly the prompt
    assert found.shares == 90 + 3 * 390 + 2 * 290


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_few_and_of_about_the_same_cost(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths, above = [], []
    for _ in range(random.integers(1, 6)):
        head = len(lengths)
        lengths += [int(random.integers(1, 400)), *random.integers(1, 300, random.integers(0, 40)).tolist()]
        above += [-1, *[head] * (len(lengths) - head - 1)]
    layout = laid_end_to_end(tuple(lengths), tuple(above))
    found, cost, numbers = deal(layout), costs(layout), parts(layout)
    assert sorted(set(numbers)) == list(range(found.num_parts))
    assert found.shares <= SHARES * layout.num_tokens
    for head in (i for i, parent in enumerate(above) if parent < 0):
        family = [head, *(i for i, parent in enumerate(above) if parent == head)]
        of_family = [numbers[i] for i in family]
        assert of_family == sorted(of_family)
        count, total = len(set(of_family)), sum(cost[i] for i in family)
        assert count <= min(PARTS, total / COST + 1)
        for part in set(of_family):
            members = [cost[i] for i in family if numbers[i] == part]
            assert sum(members) <= 2 * max(total / count, max(members))
        alone = laid_end_to_end(tuple(lengths[i] for i in family), (-1, *[0] * (len(family) - 1)))
        assert parts(alone) == [number - of_family[0] for number in of_family]


def test_a_parent_comes_first() -> None:
    with pytest.raises(ValueError, match="segment 1 before its parent, 2"):
        deal(laid_end_to_end((2, 3, 3), (-1, 2, 0)))
