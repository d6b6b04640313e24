"""A trainer's data: read, rendered, tokenised and reported before training, or streamed while it goes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from posttrain.data.mixing import Mixture
from posttrain.data.prepare import prepare, stream
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import source_name
from posttrain.errors import ConfigError, DataError
from posttrain.models.capabilities import learned_places
from posttrain.trainers.base import PackedTrainer
from posttrain.trainers.config import PackedConfig
from posttrain.types import Sample, Tokenized

logger = logging.getLogger("posttrain")


class DataTrainer(PackedTrainer):
    """Base of the trainers that learn from a fixed set of rows. A subclass sets `_settings`, `_tokenizer`, `_model`;
    `looked_at` is how many rows of a stream it wants to see before training (`_beginning`)."""

    args: PackedConfig
    _settings: DataSettings
    _tokenizer: PreTrainedTokenizerBase
    _model: Any
    looked_at: ClassVar[int] = 1
    _beginning: Sequence[Sample] = ()
    _readers: Mapping[str, Any] | None = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics over `eval_dataset` (default: the trainer's own; a string names one of several)."""
        if ignore_keys is not None:
            raise ConfigError("evaluate(ignore_keys=...) is not honoured: compute_metrics receives logits only")
        if isinstance(eval_dataset, str) and eval_dataset in self.run.eval_sets:
            sets: Mapping[str, Sequence[Sample]] = {"": self.run.eval_sets[eval_dataset]}
        else:
            sets = self.run.eval_sets if eval_dataset is None else self._eval_sets(eval_dataset)
        metrics = self.run.evaluate(sets, prefix=metric_key_prefix)
        assert metrics is not None
        return metrics

    # --- data -------------------------------------------------------------------------------------------------------

    def _train_samples(self, dataset: Any) -> Sequence[Sample] | Callable[[int], Iterator[Sample]]:
        if dataset is None:
            raise ConfigError("train_dataset is required")
        if _is_stream(dataset) or self.args.dataset_streaming:
            self._check_stream(dataset)
            return lambda number: self._stream(dataset, number)
        return self._prepared(dataset, "train", self._settings)

    def _fitting(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Each of them, known to fit the model."""
        for sample in samples:
            self._check_fits([sample])
            yield sample

    def _check_fits(self, samples: Iterable[Sample]) -> None:
        """A tokenizer may know more tokens than the model (Gemma 3's does), as long as the rows have none of them; and
        positions that are learned (GPT-2's) come to an end. Raises ConfigError."""
        readers = {"the model": self._model} if self._readers is None else self._readers
        limits = [
            (name, model.get_input_embeddings().weight.shape[0], learned_places(model))
            for name, model in readers.items()
        ]
        for sample in samples:
            for part in sample:
                for limit in limits:
                    _check_part(part, *limit)

    def _stream(self, dataset: Any, number: int) -> Iterator[Sample]:
        """Pass `number` over it, in an order of its own where it is shuffled; `data_reports` counts along."""
        if number and isinstance(dataset, Iterator):
            raise DataError(
                f"{source_name(dataset, 'train')} has given all its rows, and training wants more of them",
                hint="pass a list or a datasets.IterableDataset, which can be read again, or a lower max_steps",
            )
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(number)
        settings = dataclasses.replace(self._settings, shuffle_seed=self._settings.shuffle_seed + number)
        report = self.data_reports["train"] = DataReport(source_name(dataset, "train"))
        return self._fitting(stream(dataset, self._tokenizer, settings, "train", report))

    def _check_stream(self, dataset: Any) -> None:
        """The first rows, now: a stream is read when training begins, which is late to learn of a wrong format."""
        if isinstance(dataset, Iterator):  # what it gives is gone then
            return
        report = DataReport(source_name(dataset, "train"))
        settings = dataclasses.replace(self._settings, packing=False, shuffle=False)
        rows = stream(dataset, self._tokenizer, settings, "train", report)
        self._beginning = list(self._fitting(islice(rows, self.looked_at)))
        if not self._beginning:
            raise DataError(f"{report.source} has no usable row", code="E-DATA-0031")
        logger.info("data     %s is read as training goes; %s", report.source, "; ".join(report.formats))

    def _eval_sets(self, dataset: Any) -> dict[str, Sequence[Sample]]:
        if dataset is None:
            return {}
        settings = self._eval_settings()
        several = dataset if isinstance(dataset, Mapping) else {"": dataset}
        return {name: self._prepared(one, name or "eval", settings) for name, one in several.items()}

    def _eval_settings(self) -> DataSettings:
        return self._settings

    def _prepared(self, dataset: Any, name: str, settings: DataSettings) -> Sequence[Sample]:
        if _is_stream(dataset):
            report = self.data_reports[name] = DataReport(source_name(dataset, name))
            samples = list(self._fitting(stream(dataset, self._tokenizer, settings, name, report)))
            if not samples:
                raise DataError(f"the {name} stream has no usable rows", code="E-DATA-0031")
            return samples
        prepared = prepare(dataset, self._tokenizer, settings, name)
        self._check_fits(prepared.samples)
        self.data_reports[name] = prepared.report
        lost = prepared.report.num_skipped or prepared.report.truncated.count
        logger.log(logging.WARNING if lost else logging.INFO, "data     %s", prepared.report.summary())
        for note in prepared.report.notes():
            logger.info("         %s", note)
        return prepared.samples


def _check_part(part: Tokenized, name: str, rows: int, places: int | None) -> None:
    """Raises ConfigError for more tokens, or others, than the model of that name knows."""
    longest = len(part.prefix) + max((len(branch.ids) for branch in part.branches), default=0)
    if places is not None and longest > places:
        raise ConfigError(f"{part.origin} has {longest} tokens, {name} {places} places", hint=f"max_length={places}")
    ids = (part.prefix, *(branch.ids for branch in part.branches))
    highest = max((int(one.max()) for one in ids if len(one)), default=0)
    if highest >= rows:
        raise ConfigError(
            f"{part.origin} has token {highest}, and {name} embeddings for {rows} tokens only",
            hint="a reference that was trained with the same tokenizer"
            if name == "ref_model"
            else "model.resize_token_embeddings(len(tokenizer)), or the tokenizer that belongs to the model",
        )


def _is_stream(dataset: Any) -> bool:
    if isinstance(dataset, Mixture):
        return dataset.is_stream
    return isinstance(dataset, Iterable) and not hasattr(dataset, "__len__")
