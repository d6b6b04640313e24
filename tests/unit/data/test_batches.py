"""Which samples make up which step: accelerate's order for the same seed, epoch by epoch, and streams that resume."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from posttrain import DataError
from posttrain.data.batches import Order, StaticSource, StreamSource
from posttrain.data.planning import Packing
from posttrain.types import Batch, Sample
from tests.pair_batches import pair_samples
from tests.tiny_batches import random_samples


@pytest.mark.parametrize("seed", [0, 42, 2**31])
@pytest.mark.parametrize("num_samples", [1, 7, 1000])
def test_shuffled_as_accelerate_shuffles(num_samples: int, seed: int) -> None:
    sampler = SeedableRandomSampler(data_source=range(num_samples), generator=torch.Generator(), data_seed=seed)
    order = Order(num_samples, batch_size=1, accumulation=1, seed=seed)
    for epoch in range(4):
        assert list(order.epoch(epoch)) == list(sampler)  # which moves to the next epoch by itself


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 1), (1, 4), (3, 2), (4, 3), (20, 1), (2, 20)])
def test_steps_are_batches_taken_together(batch_size: int, accumulation: int, drop_last: bool) -> None:
    """transformers: a data loader's batches, `gradient_accumulation_steps` of them a step, what is left the last."""
    order = Order(14, batch_size, accumulation, seed=7, drop_last=drop_last)
    sampler = SeedableRandomSampler(data_source=range(14), generator=torch.Generator(), data_seed=7)
    if order.batches_per_epoch == 0:
        assert drop_last
        assert batch_size == 20
        return
    for epoch in range(3):
        batches = list(BatchSampler(sampler, batch_size, drop_last))
        assert len(batches) == order.batches_per_epoch
        steps = [list(chain(*batches[i : i + accumulation])) for i in range(0, len(batches), accumulation)]
        assert len(steps) == order.steps_per_epoch
        first = epoch * order.steps_per_epoch
        assert [order.step(first + i) for i in range(len(steps))] == steps
        done = [order.epoch_after(first + i + 1) for i in range(len(steps))]
        whole = [epoch + min(1, (i + 1) * accumulation / len(batches)) for i in range(len(steps))]
        assert done == pytest.approx(whole)
        assert done[-1] == epoch + 1


def test_without_a_seed_the_data_s_own_order() -> None:
    order = Order(5, 2, 1, seed=None)
    assert [order.step(i) for i in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_grouped_by_length_as_transformers_groups() -> None:
    lengths = tuple((37 * i) % 50 for i in range(23))
    order = Order(23, 2, 2, seed=3, lengths=lengths)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(3 + epoch)
        assert list(order.epoch(epoch)) == list(LengthGroupedSampler(4, lengths=list(lengths), generator=generator))
    assert sorted(order.epoch(0)) == list(range(23))


def test_a_step_needs_no_replay_of_those_before_it() -> None:
    order = Order(101, 3, 2, seed=5)
    one_by_one = [order.step(i) for i in range(50)]
    assert [Order(101, 3, 2, seed=5).step(i) for i in reversed(range(50))] == one_by_one[::-1]


def rows_of(batches: list[Batch]) -> list[int]:
    return sorted(origin.row for batch in batches for origin in batch.origins_S)


def test_static_source_serves_the_order_cut_to_the_budget() -> None:
    samples = random_samples([5] * 10)
    source = StaticSource(samples, Order(10, 2, 2, seed=1), token_budget=11)
    assert source.steps_per_epoch == 3
    for step in range(6):
        batches = source.micro_batches(step)
        assert rows_of(batches) == sorted(source.order.step(step))
        assert all(batch.num_tokens <= 11 for batch in batches)
    assert source.epoch_after(3) == 1.0


# --- streams --------------------------------------------------------------------------------------------------------


class Stream:
    """Ten samples a pass; counts the passes and the samples taken."""

    def __init__(self, count: int = 10) -> None:
        self.samples, self.passes, self.taken = random_samples([4] * count), 0, 0

    def __call__(self, number: int = 0) -> Iterator[Sample]:
        self.passes += 1
        for sample in self.samples:
            self.taken += 1
            yield sample


def test_a_stream_s_last_step_of_a_pass_may_be_smaller() -> None:
    source = StreamSource(Stream(), step_size=4, token_budget=100, max_steps=7)
    assert [rows_of(source.micro_batches(step)) for step in range(7)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3],
    ]  # fmt: skip
    assert source.steps_per_epoch == 7
    assert [source.epoch_after(step) for step in (0, 7)] == [0.0, 1.0]


@pytest.mark.parametrize("count", [1, 4, 8, 10])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 5, 6])
def test_a_stream_resumes_where_it_was(step: int, count: int) -> None:
    def source() -> StreamSource:
        return StreamSource(Stream(count), step_size=4, token_budget=100, max_steps=8)

    undisturbed = source()
    expected = [rows_of(undisturbed.micro_batches(i)) for i in range(8)]
    resumed = source()
    assert [rows_of(resumed.micro_batches(i)) for i in range(step, 8)] == expected[step:]


def test_a_stream_asked_for_an_earlier_step_begins_again() -> None:
    stream = Stream()
    source = StreamSource(stream, step_size=4, token_budget=100, max_steps=8)
    first = rows_of(source.micro_batches(0))
    source.micro_batches(4)
    assert rows_of(source.micro_batches(0)) == first
    assert stream.passes == 3


def test_a_stream_is_read_no_further_than_needed() -> None:
    stream = Stream()
    source = StreamSource(stream, step_size=4, token_budget=100, max_steps=8)
    source.micro_batches(1)
    assert stream.taken == 8


def test_an_empty_stream_is_an_error_and_not_an_endless_loop() -> None:
    source = StreamSource(lambda number: iter(()), step_size=4, token_budget=100, max_steps=8)
    with pytest.raises(DataError, match="the training stream has no usable rows") as caught:
        source.micro_batches(0)
    assert caught.value.code == "E-DATA-0031"


def test_asked_for_again_under_another_budget_a_step_is_packed_as_before() -> None:
    """As after a shortage of memory: groups stay together, and columns with their samples."""
    samples = pair_samples(("label",))
    source = StreamSource(lambda number: iter(samples), step_size=4, token_budget=1000, max_steps=2)
    source.packing = Packing(group_size=2, columns=("label",))
    first = source.micro_batches(0)
    source.token_budget = 1
    again = source.micro_batches(0)
    assert [batch.columns["label_S"].tolist() for batch in again] == [b.columns["label_S"].tolist() for b in first]
    assert len(again) == 2


def test_what_fills_no_batch_at_the_end_of_a_stream_is_left_out_where_asked() -> None:
    source = StreamSource(Stream(), step_size=8, token_budget=100, max_steps=4, whole=4)
    assert [rows_of(source.micro_batches(step)) for step in range(3)] == [
        list(range(8)),
        list(range(8)),
        list(range(8)),
    ]
    short = StreamSource(Stream(3), step_size=4, token_budget=100, max_steps=4, whole=4)
    with pytest.raises(DataError, match="fewer than 4 usable rows, which make no batch"):
        short.micro_batches(0)
