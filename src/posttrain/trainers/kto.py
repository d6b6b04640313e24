"""`KTOTrainer` and `KTOConfig`: TRL 1.16's arguments, posttrain's engine.

Rows are rated answers, or pairs, each of which is two of them. Beside every answer its batch holds the answer of the
row before it, on the same prompt, from which the divergence of policy and reference is estimated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

from transformers import TrainingArguments

from posttrain.data.ratings import with_mismatched, without_whole_answers
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError
from posttrain.objectives.kto import LOSSES, WITH_POINT, RatedLoss
from posttrain.trainers.answers import AnswerTrainer, ReferenceConfig, check_reference
from posttrain.trainers.config import PackedConfig, accepts_old_spellings
from posttrain.trainers.forewarning import Betas
from posttrain.trainers.opening import read_config, refuse
from posttrain.types import Sample

logger = logging.getLogger("posttrain")
ALONE = "alone in its batch of %d: the KL is estimated from itself there"
BALANCED = (1.0, 4 / 3)
"""Where the total weight of good answers over that of bad ones should lie (arXiv 2402.01306, section 4.2)."""


@accepts_old_spellings
@dataclass
class KTOConfig(ReferenceConfig):
    """Settings of Kahneman-Tversky optimisation. Raises ConfigError for one that is not honoured, naming it."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        **PackedConfig.CHOICES,
        "loss_type": tuple(LOSSES),
        "truncation_mode": ("keep_start",),
    }

    loss_type: str = field(default="kto", metadata={"help": f"One of: {', '.join(LOSSES)}."})
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of good answers."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of bad answers."})
    train_sampling_strategy: str = field(
        default="sequential",
        metadata={"help": "With loss_type kto only 'sequential': the answers of a batch belong together."},
    )
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle once before batches are made."})

    def _check_choices(self) -> None:
        super()._check_choices()
        if self.loss_type not in WITH_POINT:
            return
        if self.per_device_train_batch_size < 2:
            hint = "4 or more; lower token_budget or turn on gradient_checkpointing to save memory"
            raise ConfigError("per_device_train_batch_size=1 leaves KTO no other answer to estimate the KL from",
                              hint=hint)  # fmt: skip
        if self.train_sampling_strategy != "sequential":
            raise ConfigError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} would part the answers that KTO's KL is "
                "estimated from",
                hint="shuffle_dataset=True shuffles once, before batches are made",
            )

    def objective(self, epoch: float = 0.0) -> RatedLoss:
        return RatedLoss(self.loss_type, self.beta, self.desirable_weight, self.undesirable_weight)


class KTOTrainer(AnswerTrainer):
    """Learning from answers that are rated good or bad.

    Args:
        model: a `PreTrainedModel`, a `PeftModel`, or the name or folder of one.
        ref_model: the reference; default: the model as it is given (with an adapter: without it, or as it is given).
        args: `KTOConfig`, or a plain `TrainingArguments`.
        train_dataset, eval_dataset: rows of `prompt`, `completion` (or `messages`) and a boolean `label`, or pairs.
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        peft_config: an adapter to add.
        optimizers, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    method: ClassVar[str] = "rated"
    columns: tuple[str, ...] = ("label",)
    betas: ClassVar[Betas | None] = Betas()
    args: KTOConfig

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **older: Any,
    ):
        processing_class = older.pop("tokenizer", None) or processing_class
        self.args = read_config(KTOConfig, model, args, older, "KTOTrainer")
        refuse(data_collator=data_collator, compute_metrics=compute_metrics)
        check_reference(model, ref_model, self.args)
        self._open(model, processing_class, peft_config, quantization_config)
        self._start(train_dataset, eval_dataset, callbacks, optimizers, ref_model=ref_model)

    def _prepared(self, dataset: Any, name: str, settings: DataSettings) -> Sequence[Sample]:
        return self._in_groups(super()._prepared(dataset, name, settings))

    def _stream(self, dataset: Any, number: int) -> Iterator[Sample]:
        rest = super()._stream(dataset, number)
        size = self.args.per_device_train_batch_size
        while group := list(islice(rest, size)):
            if len(group) == 1 and self.args.loss_type in WITH_POINT and not self.args.dataloader_drop_last:
                logger.warning("the last answer of pass %d over the stream is %s: set dataloader_drop_last=True",
                               number + 1, ALONE % size)  # fmt: skip
            yield from self._in_groups(group)

    def _in_groups(self, samples: Sequence[Sample]) -> list[Sample]:
        if self.args.loss_type not in WITH_POINT:
            return without_whole_answers(samples)
        return with_mismatched(samples, self.args.per_device_train_batch_size, self.args.max_length)

    def _remarks(self, samples: Sequence[Sample], *, is_whole: bool = True) -> Iterator[str]:
        """Weights that do not make up for the labels' numbers, and labels that come sorted, spoil a run as well."""
        yield from super()._remarks(samples, is_whole=is_whole)
        args = self.args
        labels = [bool(sample[0].columns["label"]) for sample in samples]
        good, bad = sum(labels), len(labels) - sum(labels)
        if not good or not bad:
            yield f"every answer is labelled {bool(good)}: KTO learns from both kinds"
            return
        if args.desirable_weight and args.undesirable_weight:
            yield from self._remarks_on_balance(good, bad)
        else:
            name, left = ("undesirable_weight", bad) if args.desirable_weight else ("desirable_weight", good)
            yield f"{name}=0 leaves {left} of {len(labels)} answers out: KTO learns from both kinds"
        size = args.per_device_train_batch_size
        if is_whole and len(labels) % size == 1 and args.loss_type in WITH_POINT and not args.dataloader_drop_last:
            alone = ALONE % size
            yield f"the last of {len(labels)} answers is {alone}; leave one out, or set dataloader_drop_last=True"
        if size == 1 or args.shuffle_dataset or args.train_sampling_strategy != "sequential":
            return
        groups = [labels[first : first + size] for first in range(0, len(labels), size)]
        if sum(len(set(group)) == 1 for group in groups) > len(groups) / 2:
            yield "most batches hold answers of one label only: the rows are sorted; set shuffle_dataset=True"

    def _remarks_on_balance(self, good: int, bad: int) -> Iterator[str]:
        args = self.args
        balance = args.desirable_weight * good / (args.undesirable_weight * bad)
        if not BALANCED[0] - 0.01 <= balance <= BALANCED[1] + 0.01:
            low, high = (share * args.undesirable_weight * bad / good for share in BALANCED)
            yield (
                f"{good} good and {bad} bad answers weigh {balance:.3g} to 1; KTO wants 1 to 1.33: set "
                f"desirable_weight between {low:.3g} and {high:.3g}"
            )
