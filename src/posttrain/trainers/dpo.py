"""`DPOTrainer`: TRL 1.16's arguments, posttrain's engine. Prompts of pairs are computed once.

Not here: images (refused), `compute_metrics` (refused: it would want logits), custom collators.
"""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, set_seed

from posttrain.data.cache import default_folder
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.templates import find_template
from posttrain.errors import ConfigError
from posttrain.reference import ReferenceModel
from posttrain.run import Run
from posttrain.trainers.arguments import check_arguments
from posttrain.trainers.base import make_events
from posttrain.trainers.data import DataTrainer
from posttrain.trainers.dpo_config import DPOConfig
from posttrain.trainers.opening import as_dict, open_model, read_config, refuse

logger = logging.getLogger("posttrain")
HIGH_RATES = {True: 1e-4, False: 1e-5}
"""From which learning rate on it is one of supervised training: with an adapter, and for all weights."""


class DPOTrainer(DataTrainer):
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
        self.args = args = read_config(DPOConfig, model, args, older, "DPOTrainer")
        refuse(data_collator=data_collator, compute_metrics=compute_metrics)
        check_arguments(args)
        _check_reference(model, ref_model, args)
        set_seed(args.seed)  # adapters are initialised at random
        model, processing_class = open_model(model, processing_class, args, peft_config, quantization_config)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        _warn_of_rate(args, isinstance(model, PeftModel))
        self._settings = _data_settings(args)
        self._tokenizer, self._model = processing_class, model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_reports: dict[str, DataReport] = {}
        train_samples = self._train_samples(train_dataset)
        objective = args.objective()
        self.run = Run(
            model=model,
            processing_class=processing_class,
            args=args,
            objective=objective,
            events=make_events(args, callbacks, model, processing_class),
            train_samples=train_samples,
            eval_sets=self._eval_sets(eval_dataset),
            token_budget=args.token_budget,
            optimizers=optimizers,
            reference=self._reference(ref_model, callable(train_samples)) if objective.needs_reference else None,
        )
        if args.eval_strategy != IntervalStrategy.NO and not self.run.eval_sets:
            raise ConfigError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset")

    def _reference(self, ref_model: Any, is_stream: bool) -> ReferenceModel:
        """Asked ahead where that saves a pass an epoch, or a copy of all weights; a stream has no rows to ask about."""
        args = self.args
        several = args.num_train_epochs > 1 or args.max_steps > 0
        whole = not isinstance(self._model, PeftModel) and ref_model is None
        precompute = args.precompute_ref_log_probs
        if precompute and is_stream:
            raise ConfigError("precompute_ref_log_probs=True needs rows that can be counted, not a stream")
        if precompute is None:
            precompute = (several or whole) and not is_stream
        folder = default_folder().parent / "reference"
        return ReferenceModel(ref_model, args.ref_adapter_name, precompute, folder if args.dataset_cache else None)


def _check_reference(model: Any, ref_model: Any, args: DPOConfig) -> None:
    if ref_model is None:
        return
    if not isinstance(ref_model, PreTrainedModel | PeftModel):
        raise ConfigError(f"ref_model must be a model, got {type(ref_model).__name__}")
    if ref_model is model:
        raise ConfigError("ref_model is the very model that is trained: it would follow the policy",
                          hint="leave it out; the starting model is the reference then")  # fmt: skip
    if args.ref_adapter_name is not None:
        raise ConfigError("ref_model and ref_adapter_name both name a reference; give one of them")


def _warn_of_rate(args: DPOConfig, adapted: bool) -> None:
    if args.learning_rate >= HIGH_RATES[adapted]:
        usual = "5e-6 to 5e-5 with an adapter" if adapted else "5e-7 to 5e-6 for all weights"
        logger.warning("learning_rate=%g is one of supervised training; preference methods take %s",
                       args.learning_rate, usual)  # fmt: skip


def _data_settings(args: DPOConfig) -> DataSettings:
    return DataSettings(
        method="preference",
        format=args.dataset_format,
        column_map=as_dict(args.dataset_columns),
        completion_only=True,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        truncation_mode=args.truncation_mode,
        on_bad_row=args.on_bad_row,
        chat_template=template.name if (template := find_template(args.chat_template_path or "")) else None,
        cache=default_folder() if args.dataset_cache else None,
    )
