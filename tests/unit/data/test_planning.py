"""Micro-batches: every sequence once, within the budget, and rows that predict the right targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from posttrain.data.planning import Packing, plan
from posttrain.types import Batch, Branch, Layout, Origin, Sample, Tokenized


def sample(index: int, *lengths: int, prefix: int = 0, branches: int = 1) -> Sample:
    """Ids `1000 * sample + position`; every third token is not supervised."""

    def part(number: int, length: int) -> Tokenized:
        start = 1000 * index + 100 * number
        made = tuple(
            Branch(np.arange(start + 10 * b, start + 10 * b + length, dtype=np.int32), np.arange(length) % 3 != 2)
            for b in range(branches)
        )
        return Tokenized(np.arange(-prefix, 0, dtype=np.int32), made, Origin("train", index))

    return tuple(part(number, length) for number, length in enumerate(lengths))


def targets(batch: Batch) -> list[int]:
    return batch.target_R.tolist()


def test_rows_predict_the_token_that_follows_them() -> None:
    (batch,) = plan([sample(1, 4), sample(2, 3)], 100)
    assert batch.input_ids_T.tolist() == [1000, 1001, 1002, 1003, 2000, 2001, 2002]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert (batch.layout.starts, batch.layout.lengths) == ((0, 4), (4, 3))
    assert batch.rows_R.tolist() == [0, 2, 4]
    assert targets(batch) == [1001, 1003, 2001]
    assert batch.input_ids_T[batch.rows_R + 1].tolist() == targets(batch)
    assert batch.sequence_R.tolist() == [0, 0, 1]
    assert batch.sample_S == (0, 1)
    assert [str(origin) for origin in batch.origins_S] == ["train[1]", "train[2]"]
    assert batch.counts == {"tokens": 3, "sequences": 2}
    assert {tensor.dtype for tensor in batch.tensors().values()} == {torch.int64}


def test_first_tokens_are_never_targets_but_the_first_after_a_prefix_is() -> None:
    (alone,) = plan([sample(0, 2)], 100)
    assert targets(alone) == [1]
    (after,) = plan([sample(0, 2, prefix=2)], 100)
    assert after.input_ids_T.tolist() == [-2, -1, 0, 1]
    assert (after.rows_R.tolist(), targets(after)) == ([1, 2], [0, 1])


def test_branches_of_one_prefix_become_sequences_of_one_sample() -> None:
    (batch,) = plan([sample(0, 2, prefix=1, branches=2)], 100, Packing(shared=False))
    assert batch.input_ids_T.tolist() == [-1, 0, 1, -1, 10, 11]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.sample_S == (0, 0)
    assert targets(batch) == [0, 1, 10, 11]
    assert (batch.layout.parents, batch.layout.is_shared) == ((), False)
    assert batch.pairs_P2 is not None
    assert batch.pairs_P2.tolist() == [[0, 1]]


def test_a_shared_prefix_stands_once_before_its_branches() -> None:
    (batch,) = plan([sample(3, 2), sample(0, 4, prefix=2, branches=2), sample(7, 2)], 100)
    assert batch.input_ids_T.tolist() == [3000, 3001, -2, -1, 0, 1, 2, 3, 10, 11, 12, 13, 7000, 7001]
    assert batch.position_ids_T.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 0, 1]
    assert batch.layout == Layout((0, 2, 4, 8, 12), (2, 2, 4, 4, 2), (-1, -1, 1, 1, -1))
    assert batch.layout.context_lengths == (2, 2, 6, 6, 2)
    assert targets(batch) == [3001, 0, 1, 3, 10, 11, 13, 7001]
    assert batch.rows_R.tolist() == [0, 3, 4, 6, 3, 8, 10, 12]  # the prefix's last token predicts each first one
    assert batch.sequence_R.tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert (batch.sample_S, batch.num_sequences) == ((0, 1, 1, 2), 4)
    assert batch.counts == {"tokens": 8, "sequences": 4, "pairs": 1, "chosen_tokens": 3, "rejected_tokens": 3}
    assert batch.pairs_P2 is not None
    assert batch.pairs_P2.tolist() == [[1, 2]]


def test_branches_are_not_parted_and_groups_are_batches() -> None:
    samples = [sample(i, 5, prefix=3, branches=2) for i in range(5)]
    assert [(b.num_tokens, b.num_sequences) for b in plan(samples, 1)] == [(13, 2)] * 5
    assert [b.num_tokens for b in plan(samples, 26)] == [26, 26, 13]
    groups = plan(samples, 1, Packing(group_size=2))
    assert [(b.sample_S, b.counts["batches"]) for b in groups] == [((0, 0, 1, 1), 1), ((2, 2, 3, 3), 1), ((4, 4), 1)]


def test_what_prompts_and_sequences_begin_with_alike_stands_once() -> None:
    opening = np.arange(-9, 0)

    def part(row: int, own: int, *branches: int) -> Sample:
        made = tuple(Branch(np.arange(n) + 100 * row, np.ones(n, dtype=bool)) for n in branches)
        return (Tokenized(np.concatenate([opening, np.full(own, row)]), made, Origin("train", row)),)

    samples = [part(1, 2, 3, 1), part(2, 0, 4), part(3, 1, 2)]
    (batch,) = plan(samples, 100, Packing(beginnings=True))
    assert batch.layout == Layout((0, 9, 11, 14, 15, 19), (9, 2, 3, 1, 4, 3), (-1, 0, 1, 1, 0, 0))
    assert batch.layout.context_lengths == (9, 11, 14, 12, 13, 12)
    assert batch.layout.last_tokens == (13, 14, 18, 21)
    assert batch.input_ids_T[9:].tolist() == [1, 1, 100, 101, 102, 100, 200, 201, 202, 203, 3, 300, 301]
    assert batch.position_ids_T.tolist() == [*range(9), 9, 10, 11, 12, 13, 11, 9, 10, 11, 12, 9, 10, 11]
    assert batch.rows_R.tolist() == [10, 11, 12, 10, 8, 15, 16, 17, 19, 20]
    assert batch.sequence_R.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    assert batch.sequence_tokens == 14 + 12 + 13 + 12
    assert [b.num_tokens for b in plan(samples, 19, Packing(beginnings=True))] == [15, 16]
    assert [b.num_tokens for b in plan(samples, 15, Packing(beginnings=True))] == [15, 13, 12]


def test_nothing_that_is_predicted_is_shared() -> None:
    def part(row: int, supervised: int) -> Sample:
        ids = np.concatenate([np.arange(20), [100 + row, 7]])
        return (Tokenized(ids[:0], (Branch(ids, np.arange(22) >= supervised),), Origin("train", row)),)

    for supervised, shared in ((0, 0), (5, 0), (12, 12), (20, 20), (21, 20), (22, 20)):
        (batch,) = plan([part(1, supervised), part(2, supervised)], 100, Packing(beginnings=True))
        assert batch.num_tokens == 44 - shared
        assert len(set(batch.rows_R.tolist())) >= len(batch.rows_R) - 1  # but for what stands before two
    (batch,) = plan([part(1, 20), part(2, 20)], 100, Packing(beginnings=True, prompts=True))
    assert batch.num_tokens == 44


def test_columns_of_pairs() -> None:
    def with_columns(index: int) -> Sample:
        (part,) = sample(index, 3, prefix=1, branches=2)
        logps = [np.full(2, index + b / 2) for b in range(2)]
        return (replace(part, columns={"margin": float(index), "ref_logp": logps, "id": "x"}),)

    (batch,) = plan([with_columns(1), with_columns(2)], 100, Packing(columns=("margin", "ref_logp")))
    assert batch.columns.keys() == {"margin_P", "ref_logp_R"}
    assert batch.columns["margin_P"].tolist() == [1, 2]
    assert batch.columns["ref_logp_R"].tolist() == [1, 1, 1.5, 1.5, 2, 2, 2.5, 2.5]


@pytest.mark.parametrize("budget", [1, 7, 16, 40, 1000])
def test_every_sequence_once_and_within_the_budget(budget: int) -> None:
    rng = np.random.default_rng(budget)
    samples = [sample(i, *rng.integers(1, 12, size=1 + i % 3)) for i in range(40)]
    batches = plan(samples, budget)
    whole = [part for s in samples for part in s]
    assert sorted(id_ for b in batches for id_ in b.input_ids_T.tolist()) == sorted(
        id_ for part in whole for id_ in part.branches[0].ids.tolist()
    )
    assert sum(b.counts["tokens"] for b in batches) == sum(part.num_supervised for part in whole)
    assert all(b.num_tokens <= budget or b.num_sequences == 1 for b in batches)
    for b in batches:
        assert b.input_ids_T[b.rows_R + 1].tolist() == targets(b)
        assert list(b.sample_S) == sorted(b.sample_S)
        first = set(b.layout.starts)
        assert not first & set((b.rows_R + 1).tolist())


def test_micro_batches_are_few_and_of_equal_size() -> None:
    sizes = [b.num_tokens for b in plan([sample(i, 10) for i in range(10)], 60)]
    assert sizes == [50, 50]
    sizes = [b.num_tokens for b in plan([sample(i, n) for i, n in enumerate([60, 40, 50, 50, 70, 30])], 100)]
    assert sizes == [100, 100, 100]
    # Emptiest-first makes 9 and 11 of these; first-fit finds the two that fit.
    sizes = [b.num_tokens for b in plan([sample(i, n) for i, n in enumerate([5, 5, 4, 3, 3])], 10)]
    assert sizes == [10, 10]


def test_a_sequence_over_the_budget_is_alone() -> None:
    batches = plan([sample(0, 5), sample(1, 30), sample(2, 5)], 12)
    assert [b.num_tokens for b in batches] == [10, 30]


def test_the_plan_is_the_same_each_time_and_empty_for_nothing() -> None:
    samples = [sample(i, 3 + i % 5) for i in range(20)]
    assert [b.input_ids_T.tolist() for b in plan(samples, 20)] == [b.input_ids_T.tolist() for b in plan(samples, 20)]
    assert plan([], 10) == []
