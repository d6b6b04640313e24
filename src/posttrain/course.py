"""The course of a run: where its steps come from, how many there are, and how large.

As transformers counts them: a step has `per_device_train_batch_size x gradient_accumulation_steps` samples, an epoch
may end with fewer, and the last epoch may be cut short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import TrainingArguments

from posttrain.data.batches import Order, StaticSource, StreamSource
from posttrain.errors import ConfigError, DataError
from posttrain.planner import Workload
from posttrain.reference import Reference
from posttrain.session import Session
from posttrain.types import Sample

Samples = Sequence[Sample] | Callable[[int], Iterator[Sample]]
"""All of them, or a function that starts a new pass over a stream."""


class Rollouts(Protocol):
    """What a run asks of a method that samples its own completions."""

    @property
    def source(self) -> Any:
        """A `RolloutSource`."""
        ...

    def workload(self, session: Session) -> Workload: ...

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        ...

    def open(self, session: Session, reference: Reference | None) -> None:
        """Before anything is sampled."""
        ...

    def resumed(self, step: int) -> None:
        """A run is taken up again after `step` steps."""
        ...

    def evaluate(
        self, session: Session, prompts: Any, stopped: Callable[[], bool], batch_done: Callable[[], None]
    ) -> dict[str, float] | None:
        """Metrics of one evaluation set, or None if `stopped()` came true."""
        ...


@dataclass(frozen=True)
class Course:
    """`source` hands out the micro-batches of `max_steps` steps in `epochs` (begun) epochs."""

    source: Any
    max_steps: int
    epochs: int


def course_of(samples: Samples, args: TrainingArguments, token_budget: int) -> Course:
    """Raises ConfigError for a stream without an end, DataError for too few samples."""
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if callable(samples):
        if args.max_steps <= 0:
            raise ConfigError("a streaming dataset has no length: set max_steps")
        source = StreamSource(samples, step_size, token_budget, args.max_steps)
        source.whole = args.per_device_train_batch_size if args.dataloader_drop_last else 1
        return Course(source, args.max_steps, 1)
    order = Order(
        len(samples),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        None if args.train_sampling_strategy == "sequential" else data_seed(args),
        args.dataloader_drop_last,
        _lengths(samples) if args.train_sampling_strategy == "group_by_length" else None,
    )
    if order.batches_per_epoch == 0:
        raise DataError(f"{len(samples)} samples make no batch of {args.per_device_train_batch_size}",
                        hint="lower per_device_train_batch_size or set dataloader_drop_last=False")  # fmt: skip
    return course_over(StaticSource(samples, order, token_budget), args)


def course_over(source: Any, args: TrainingArguments) -> Course:
    """Of a source that knows how long its epochs are."""
    per_epoch = source.steps_per_epoch
    if args.max_steps > 0:
        return Course(source, args.max_steps, math.ceil(args.max_steps / per_epoch))
    return Course(source, math.ceil(args.num_train_epochs * per_epoch), math.ceil(args.num_train_epochs))


def data_seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def workload_of(samples: Samples, args: TrainingArguments, token_budget: int) -> Workload:
    """Of a stream no more is known than the token budget."""
    if callable(samples):
        return Workload(token_budget, token_budget, getattr(args, "max_length", None) or token_budget)
    lengths = sorted(_lengths(samples), reverse=True)
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    usual = min(len(lengths), step_size) * sum(lengths) // len(lengths)
    longest = max(part.num_tokens for sample in samples for part in sample)
    return Workload(usual, sum(lengths[:step_size]), longest)


def _lengths(samples: Sequence[Sample]) -> tuple[int, ...]:
    return tuple(sum(part.num_tokens for part in sample) for sample in samples)
