"""`DPOTrainer`: TRL 1.16's arguments, posttrain's engine. Prompts of pairs are computed once."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import TrainingArguments

from posttrain.trainers.answers import AnswerTrainer, check_reference
from posttrain.trainers.dpo_config import DPOConfig
from posttrain.trainers.forewarning import Betas
from posttrain.trainers.opening import read_config, refuse


class DPOTrainer(AnswerTrainer):
    """Preference optimisation.

    Args:
        model: a `PreTrainedModel`, a `PeftModel`, or the name or folder of one.
        ref_model: the reference; default: the model as it is given (with an adapter: without it, or as it is given).
        args: `DPOConfig`, or a plain `TrainingArguments`.
        train_dataset, eval_dataset: `datasets.Dataset` or `IterableDataset`, a list of dicts, or a path, of pairs:
            `chosen` and `rejected`, text or messages, behind a `prompt` or with one in common. The evaluation set may
            be a dict of several.
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        peft_config: an adapter to add.
        optimizers, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    betas: ClassVar[Betas | None] = Betas()
    args: DPOConfig

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
        self.args = read_config(DPOConfig, model, args, older, "DPOTrainer")
        refuse(data_collator=data_collator, compute_metrics=compute_metrics)
        check_reference(model, ref_model, self.args)
        self._open(model, processing_class, peft_config, quantization_config)
        self._start(train_dataset, eval_dataset, callbacks, optimizers, ref_model=ref_model)
