"""What sequences begin with alike: as many tokens spared as any choice of families spares, and no wrong one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from posttrain.data import beginnings
from posttrain.data.beginnings import LEAST_SHARE, LEAST_TOKENS, Beginning, find_beginnings


def find(*written: str, size: int = 0) -> list[Beginning | None]:
    """Of openings, letters in place of tokens; whole sequences have `size` tokens more."""
    openings = [np.array([ord(letter) for letter in one]) for one in written]
    return find_beginnings(openings, [len(one) + size for one in openings])


def families(found: Sequence[Beginning | None]) -> dict[int, tuple[int, list[int]]]:
    """Their lengths and members."""
    made: dict[int, tuple[int, list[int]]] = {}
    for index, beginning in enumerate(found):
        if beginning is not None:
            made.setdefault(beginning.family, (beginning.length, []))[1].append(index)
            assert made[beginning.family][0] == beginning.length
    return made


def spared(found: Sequence[Beginning | None]) -> int:
    return sum((len(members) - 1) * length for length, members in families(found).values())


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *others = items
    for rest in partitions(others):
        yield [[first], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [first, *part], *rest[i + 1 :]]


def in_common(whole: list[np.ndarray]) -> int:
    most = min(map(len, whole))
    return next((i for i in range(most) if len({one[i] for one in whole}) > 1), most)


@pytest.fixture
def any_length_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "LEAST_TOKENS", 1)
    monkeypatch.setattr(beginnings, "LEAST_SHARE", 0.0)


@pytest.mark.usefixtures("any_length_counts")
@pytest.mark.parametrize("seed", range(150))
def test_no_other_choice_of_families_spares_more(seed: int) -> None:
    """Openings grow on each other at random, so that the tree has many levels of many lengths."""
    random = np.random.default_rng(seed)
    whole = [random.integers(0, 3, random.integers(0, 9))]
    for _ in range(random.integers(0, 7)):
        other = whole[random.integers(len(whole))]
        stem = other[: random.integers(len(other) + 1)]
        whole.append(np.concatenate([stem, random.integers(0, 3, random.integers(0, 9))]))
    found = find_beginnings(whole, [len(one) for one in whole])
    for length, members in families(found).values():
        assert len(members) > 1
        assert 0 < length <= in_common([whole[i] for i in members])
    choices = partitions(list(range(len(whole))))
    best = max(sum((len(part) - 1) * in_common([whole[i] for i in part]) for part in parts) for parts in choices)
    assert spared(found) == best


@pytest.mark.usefixtures("any_length_counts")
def test_a_subtree_keeps_a_longer_beginning_of_its_own() -> None:
    found = find("systemA question", "systemB one", "systemA quest", "systemB on", "system")
    assert families(found) == {2: (13, [0, 2]), 4: (6, [1, 3, 4])}
    found = find("sysAx", "sysBy", "sysCz", "sysAw")
    assert families(found) == {3: (3, [0, 1, 2, 3])}  # one family of four spares 9, two of "sysA" would spare 4


@pytest.mark.usefixtures("any_length_counts")
def test_two_alike_do_not_keep_others_from_a_family() -> None:
    """What has one token more in common with two that are long and alike still belongs to all the others."""
    opening, long = "s" * 100, "q" * 900
    found = find(f"{opening}q{long}", f"{opening}q{long}", f"{opening}qz", f"{opening}h", f"{opening}k")
    assert families(found) == {0: (1001, [0, 1]), 3: (100, [2, 3, 4])}
    assert spared(find("sixteen......aA1", "sixteen......aA2", "sixteen.bbbbbbB1", "sixteen.bbbbbbB2")) == 30


@pytest.mark.usefixtures("any_length_counts")
def test_equal_ones_share_everything() -> None:
    assert families(find("same", "same", "same and more")) == {0: (4, [0, 1, 2])}
    assert families(find("a", "a", "", "ab")) == {0: (1, [0, 1, 3])}
    assert find_beginnings([], []) == []


def test_what_is_hardly_anything_does_not_count() -> None:
    short, long = "x" * (LEAST_TOKENS - 1), "x" * LEAST_TOKENS
    assert find(f"{short}abc", f"{short}bcd") == [None, None]
    assert families(find(f"{long}abc", f"{long}bcd")) == {0: (LEAST_TOKENS, [0, 1])}
    rest = int(LEAST_TOKENS / LEAST_SHARE) // 2  # of each, where one beginning of two is spared
    assert find(f"{long}a", f"{long}b", size=rest) == [None, None]
    assert families(find(f"{long}a", f"{long}b", size=rest - LEAST_TOKENS - 1))


def test_token_ids_of_any_size_and_many_sequences() -> None:
    opening = np.arange(100_000, 100_020, dtype=np.int32)
    whole = [np.concatenate([opening, np.array([i, 7], dtype=np.int32)]) for i in range(20_000)]
    assert set(find_beginnings(whole, [22] * len(whole))) == {Beginning(0, 20)}


def test_a_deep_tree() -> None:
    whole = [np.arange(LEAST_TOKENS + i) for i in range(1500)]
    found = find_beginnings(whole, [len(one) for one in whole])
    assert len(families(found)) > 10
    assert spared(found) > 0.9 * sum(map(len, whole)) - 50_000
