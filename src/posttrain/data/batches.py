"""Which samples make up optimiser step n. A pure function of the seed and n, so resuming needs no replay.

The order is the one transformers and accelerate produce for the same seed: epoch e is `torch.randperm` under a
generator seeded with `seed + e`, cut into batches of `per_device_train_batch_size`, of which a step takes
`gradient_accumulation_steps`; the last step of an epoch may be smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch

from posttrain.data.planning import PLAIN, Packing, plan
from posttrain.errors import DataError
from posttrain.types import Batch, Sample


@dataclass(frozen=True)
class Order:
    """`seed=None` keeps the data's own order; `drop_last` leaves out an incomplete last batch of an epoch; with
    `lengths` (tokens of each sample) samples of similar length come together, as `group_by_length` asks."""

    num_samples: int
    batch_size: int
    accumulation: int
    seed: int | None
    drop_last: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def batches_per_epoch(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, math.ceil(self.batches_per_epoch / self.accumulation))

    def epoch(self, epoch: int) -> Sequence[int]:
        """Sample indices in the order of one epoch."""
        if self.seed is None:
            return range(self.num_samples)
        if self.lengths is not None:
            return _grouped(self.lengths, self.batch_size * self.accumulation, self.seed + epoch)
        return _shuffled(self.num_samples, self.seed + epoch)

    def step(self, step: int) -> list[int]:
        """Sample indices of optimiser step `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        usable = self.epoch(epoch)[: self.batches_per_epoch * self.batch_size]
        return list(usable[within * size : (within + 1) * size])

    def epoch_after(self, step: int) -> float:
        """`trainer_state.json`'s epoch after `step` steps: whole epochs, and the share of this one's batches."""
        done, within = divmod(step, self.steps_per_epoch)
        if within == 0:
            return float(done)
        return done + within * self.accumulation / self.batches_per_epoch


@lru_cache(maxsize=2)
def _shuffled(num_samples: int, seed: int) -> Sequence[int]:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=2)
def _grouped(lengths: tuple[int, ...], step_size: int, seed: int) -> Sequence[int]:
    from transformers.trainer_pt_utils import get_length_grouped_indices

    return get_length_grouped_indices(lengths, step_size, generator=torch.Generator().manual_seed(seed))


@dataclass
class StaticSource:
    """Tokenized samples held in memory, served as the micro-batches of each step. The token budget may change between
    two calls."""

    samples: Sequence[Sample]
    order: Order
    token_budget: int
    packing: Packing = PLAIN

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def micro_batches(self, step: int) -> list[Batch]:
        """Everything step `step` computes on, cut to the token budget."""
        return plan([self.samples[i] for i in self.order.step(step)], self.token_budget, self.packing)

    def epoch_after(self, step: int) -> float:
        return self.order.epoch_after(step)

    def tokens(self, step: int, micro: list[Batch]) -> int:
        return sum(batch.sequence_tokens for batch in micro)

    def state(self, position: int) -> dict[str, Any]:
        """Nothing: the order follows from the seed."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class StreamSource:
    """Samples that come one after another from `restart(pass)`, an iterator made anew whenever it is exhausted; passes
    count from 0. To resume at step n it reads past what the first n steps used. The whole run counts as one epoch, so
    what is due every epoch is due at its end. What fills no batch of `whole` samples when a pass ends is left out."""

    restart: Callable[[int], Iterator[Sample]]
    step_size: int
    token_budget: int
    max_steps: int
    packing: Packing = PLAIN
    whole: int = 1
    _stream: Iterator[Sample] | None = None
    _latest: tuple[int, list[Sample]] = (-1, [])
    _next_step: int = 0
    _pass: int = -1

    @property
    def steps_per_epoch(self) -> int:
        return self.max_steps

    def micro_batches(self, step: int) -> list[Batch]:
        if self._latest[0] == step:  # asked for again, under another token budget
            return plan(self._latest[1], self.token_budget, self.packing)
        while self._next_step < step:
            self._take()
        if self._next_step > step:  # an earlier run's stream is further on; begin again
            self._stream, self._next_step, self._pass = None, 0, -1
            return self.micro_batches(step)
        self._latest = step, self._take()
        return plan(self._latest[1], self.token_budget, self.packing)

    def _take(self) -> list[Sample]:
        """The samples of one step; the last of a pass over the data may be fewer."""
        fresh = self._stream is None
        if self._stream is None:
            self._pass += 1
            self._stream = self.restart(self._pass)
        stream = self._stream
        samples = list(islice(stream, self.step_size))
        samples = samples[: len(samples) - len(samples) % self.whole]
        if not samples:
            if fresh:
                raise DataError(f"the training stream has {_fewer_than(self.whole)}", code="E-DATA-0031")
            self._stream = None
            return self._take()
        self._next_step += 1
        return samples

    def epoch_after(self, step: int) -> float:
        return step / self.max_steps

    def tokens(self, step: int, micro: list[Batch]) -> int:
        return sum(batch.sequence_tokens for batch in micro)

    def state(self, position: int) -> dict[str, Any]:
        """Nothing: what comes before is read again."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


def _fewer_than(whole: int) -> str:
    return "no usable rows" if whole == 1 else f"fewer than {whole} usable rows, which make no batch"
