"""Packs equal TRL's, pack by pack, and order equals that of `datasets`."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.encode import EMPTY
from posttrain.data.packing import pack
from posttrain.types import Branch, Origin, Tokenized


def examples(lengths: list[int]) -> list[Tokenized]:
    """Distinct ids throughout, so that no two tokens can be confused."""
    starts = np.cumsum(lengths) - lengths
    branches = [
        Branch(np.arange(start, start + length, dtype=np.int32), np.arange(length) % 3 > 0)
        for start, length in zip(starts, lengths, strict=True)
    ]
    return [Tokenized(EMPTY, (branch,), Origin("t", i)) for i, branch in enumerate(branches)]


def lengths(seed: int, count: int, high: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, high, size=count).tolist()


@pytest.mark.parity
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize(
    ("sizes", "max_length"),
    [
        (lengths(0, 2500, 40), 32),  # several windows, many ties, overflow
        (lengths(1, 300, 200), 100),
        (lengths(2, 64, 9), 8),
        ([5, 2, 3, 1], 4),
        ([4, 4, 8], 4),
        ([7], 4),
    ],
)
def test_packs_equal_trl(strategy: str, sizes: list[int], max_length: int) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    ours = list(pack(examples(sizes), max_length, strategy))
    rows = {
        "input_ids": [e.branches[0].ids.tolist() for e in examples(sizes)],
        "labels": [np.where(e.branches[0].supervised, e.branches[0].ids, -100).tolist() for e in examples(sizes)],
    }
    theirs = trl.pack_dataset(datasets.Dataset.from_dict(rows), max_length, strategy)
    assert len(ours) == len(theirs)
    for mine, row in zip(ours, theirs, strict=True):
        ids = np.concatenate([part.branches[0].ids for part in mine])
        supervised = np.concatenate([part.branches[0].supervised for part in mine])
        assert ids.tolist() == row["input_ids"]
        assert np.where(supervised, ids, -100).tolist() == row["labels"]
        assert [part.num_tokens for part in mine] == row.get("seq_lengths", [len(ids)])


def test_bfd_by_hand() -> None:
    packs = list(pack(examples([5, 2, 3, 1]), 4, "bfd"))
    assert [[part.origin.row for part in sample] for sample in packs] == [[0], [2, 3], [1]]
    assert [[part.num_tokens for part in sample] for sample in packs] == [[4], [3, 1], [2]]


def test_nothing_is_lost_by_splitting_or_wrapping() -> None:
    for strategy in ("bfd_split", "wrapped"):
        packs = list(pack(examples([5, 2, 3, 1]), 4, strategy))
        ids = np.concatenate([part.branches[0].ids for sample in packs for part in sample])
        assert sorted(ids.tolist()) == list(range(11))


def test_wrapped_packs_are_one_sequence_and_name_their_first_example() -> None:
    packs = list(pack(examples([3, 3, 3]), 4, "wrapped"))
    assert [len(sample) for sample in packs] == [1, 1, 1]
    assert [sample[0].origin.row for sample in packs] == [0, 1, 2]
