"""A data set, made ready for training: its rows as tokens, in packs where asked, in order, with a report.

In memory (`prepare`) or one at a time (`stream`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data import cache
from posttrain.data.packing import pack
from posttrain.data.pipeline import Pipeline
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import source_name
from posttrain.errors import DataError
from posttrain.types import Sample, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataReport", "DataSettings", "Prepared", "prepare", "stream"]


SHUFFLE_BUFFER = 10_000
logger = logging.getLogger("posttrain")


@dataclass(frozen=True)
class Prepared:
    samples: list[Sample]
    report: DataReport

    @property
    def is_conversational(self) -> bool:
        return self.report.conversational > 0


def prepare(dataset: Any, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, name: str = "train") -> Prepared:
    """All of `dataset` in memory. Shuffled, where asked, as `datasets` shuffles, before packing and after it."""
    examples, report = _tokenized(dataset, tokenizer, settings, name)
    if not examples:
        raise _nothing_left(report, settings)
    samples: list[Sample]
    if settings.packing:
        assert settings.max_length is not None
        examples = _shuffled(examples, settings)
        samples = list(pack(examples, settings.max_length, settings.packing_strategy))
        _count_packs(examples, samples, settings.max_length, report)
    else:
        samples = [(example,) for example in examples]
    return Prepared(_shuffled(samples, settings), report)


def _tokenized(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, name: str
) -> tuple[list[Tokenized], DataReport]:
    """Every row as tokens, from the cache where they were made before."""
    key = cache.cache_key(dataset, tokenizer, settings) if settings.cache is not None else None
    if settings.cache is not None and key is not None and (kept := cache.read(settings.cache, key)) is not None:
        logger.info("data     tokens of %s taken from %s", kept[1].source, settings.cache / f"{key[:8]}...")
        return kept
    report, started = DataReport(source_name(dataset, name)), time.monotonic()
    examples = list(Pipeline(tokenizer, settings, report).run(dataset, name))
    took_long = time.monotonic() - started >= cache.MIN_SECONDS
    if settings.cache is not None and key is not None and examples and took_long:
        cache.write(settings.cache, key, examples, report)
    return examples, report


def stream(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    name: str = "train",
    report: DataReport | None = None,
) -> Iterator[Sample]:
    """The same one at a time, for data that are endless or do not fit in memory; `report` counts along. Shuffled, where
    asked, by the source itself (`datasets.IterableDataset`) or within a buffer of `SHUFFLE_BUFFER` examples."""
    report = report or DataReport(source_name(dataset, name))
    shuffles_itself = hasattr(dataset, "shuffle")
    if settings.shuffle and shuffles_itself:
        dataset = dataset.shuffle(seed=settings.shuffle_seed)
    examples = Pipeline(tokenizer, settings, report).run(dataset, name)
    if settings.shuffle and not shuffles_itself:
        examples = _shuffled_in_buffer(examples, settings.shuffle_seed)
    if settings.packing and settings.max_length is not None:
        return pack(examples, settings.max_length, settings.packing_strategy)
    return ((example,) for example in examples)


def _shuffled(items: list[Any], settings: DataSettings) -> list[Any]:
    """In the order of `datasets.Dataset.shuffle(seed=...)`."""
    if not settings.shuffle:
        return items
    return [items[i] for i in np.random.default_rng(settings.shuffle_seed).permutation(len(items))]


def _shuffled_in_buffer(examples: Iterator[Tokenized], seed: int) -> Iterator[Tokenized]:
    """Every example leaves at a random moment once the buffer is full, the rest at the end in random order."""
    generator = np.random.default_rng(seed)
    buffer = list(islice(examples, SHUFFLE_BUFFER))
    for example in examples:
        chosen = int(generator.integers(len(buffer)))
        buffer[chosen], leaving = example, buffer[chosen]
        yield leaving
    yield from (buffer[i] for i in generator.permutation(len(buffer)))


def _count_packs(examples: list[Tokenized], samples: list[Sample], max_length: int, report: DataReport) -> None:
    report.packs = len(samples)
    tokens, supervised = report.tokens, report.supervised
    report.tokens = sum(part.num_tokens for sample in samples for part in sample)
    report.supervised = sum(part.num_supervised for sample in samples for part in sample)
    report.tokens_lost = tokens - report.tokens
    if not report.tokens_lost:  # only `bfd` cuts anything off
        return
    report.supervised_lost = supervised - report.supervised
    for example in (example for example in examples if example.num_tokens > max_length):
        report.truncated.add(example.origin)
        if not example.branches[0].supervised[1:max_length].any():
            report.untrained.add(example.origin)


def _nothing_left(report: DataReport, settings: DataSettings) -> DataError:
    reasons = ", ".join(f"{cases.count} {reason}" for reason, cases in report.skipped.items())
    message = f"{report.source}: none of {report.rows} rows is left ({reasons})"
    hint = f"the first: {report.first_error}" if report.first_error else None
    if settings.max_length is not None and not report.first_error:
        other = ', or try truncation_mode="keep_end"' if settings.method == "sft" else ""
        hint = f"max_length={settings.max_length} leaves no token to train in any row: raise it{other}"
    return DataError(message, hint=hint, code="E-DATA-0031")
