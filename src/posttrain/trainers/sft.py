"""`SFTTrainer`: TRL 1.16's arguments, posttrain's engine.

Not here: images (refused), `compute_loss_func` and custom collators (a loss is an objective; batches are packed, so
there is nothing to collate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import EvalPrediction, IntervalStrategy, PredictionOutput, set_seed

from posttrain.data.cache import default_folder
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.templates import find_template
from posttrain.errors import ConfigError
from posttrain.evaluate.predictions import Predictor
from posttrain.objectives.sft import SupervisedLoss
from posttrain.run import Run
from posttrain.trainers.arguments import check_arguments
from posttrain.trainers.base import make_events
from posttrain.trainers.config import SFTConfig
from posttrain.trainers.data import DataTrainer
from posttrain.trainers.opening import as_dict, open_model, read_config, refuse


class SFTTrainer(DataTrainer):
    """Supervised fine-tuning.

    Args:
        model: a `PreTrainedModel`, a `PeftModel`, or the name or folder of one.
        args: `SFTConfig`, or a plain `TrainingArguments`.
        train_dataset, eval_dataset: `datasets.Dataset` or `IterableDataset`, a list of dicts, or a path; the evaluation
            set may be a dict of several. Rows may be tokenized (`input_ids` with `labels` or masks).
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        peft_config: an adapter to add.
        formatting_func: a function from a row to a text.
        compute_metrics, preprocess_logits_for_metrics: as in transformers; they cost padded forwards with full logits.
        optimizers, optimizer_cls_and_kwargs, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    args: SFTConfig

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        **older: Any,
    ):
        processing_class = older.pop("tokenizer", None) or processing_class
        self.args = args = read_config(SFTConfig, model, args, older, "SFTTrainer")
        refuse(data_collator=data_collator, compute_loss_func=compute_loss_func)
        check_arguments(args)
        if optimizer_cls_and_kwargs is not None and optimizers[0] is not None:
            raise ConfigError("optimizers and optimizer_cls_and_kwargs both name an optimiser; give one of them")
        set_seed(args.seed)  # adapters are initialised at random
        model, processing_class = open_model(model, processing_class, args, peft_config, quantization_config)
        self._settings = _data_settings(args, formatting_func)
        self._tokenizer, self._model = processing_class, model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_reports: dict[str, DataReport] = {}
        self._compute_metrics, self._preprocess_logits = compute_metrics, preprocess_logits_for_metrics
        predictor = Predictor(args, compute_metrics, preprocess_logits_for_metrics) if compute_metrics else None
        if train_dataset is not None:
            self._check_prepared(train_dataset)
        self.run = Run(
            model=model,
            processing_class=processing_class,
            args=args,
            objective=SupervisedLoss(args.loss_type, args.label_smoothing_factor if args.loss_type == "nll" else 0.0),
            events=make_events(args, callbacks, model, processing_class),
            train_samples=self._train_samples(train_dataset),
            eval_sets=self._eval_sets(eval_dataset),
            token_budget=args.token_budget,
            predict=predictor,
            optimizers=optimizers,
            optimizer_choice=optimizer_cls_and_kwargs,
        )
        if args.eval_strategy != IntervalStrategy.NO and not self.run.eval_sets:
            raise ConfigError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset")

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits (or what `preprocess_logits_for_metrics` makes of them), labels and metrics over `test_dataset`; the
        log is not touched. Logits of a whole set are large: `(rows, longest, vocabulary)` in fp32."""
        if ignore_keys is not None:
            raise ConfigError("predict(ignore_keys=...) is not honoured: there are logits only")
        seen: list[EvalPrediction] = []
        own = self.run.predict

        def collect(prediction: EvalPrediction) -> dict[str, float]:
            seen.append(prediction)
            return self._compute_metrics(prediction) if self._compute_metrics else {}

        all_outputs: dict[str, Any] = {"prediction_loss_only": False, "batch_eval_metrics": False}
        args = dataclasses.replace(self.args, **all_outputs)
        self.run.predict = Predictor(args, collect, self._preprocess_logits)
        try:
            sets = self._eval_sets(test_dataset)
            metrics = self.run.evaluate(sets, prefix=metric_key_prefix, logged=False)
        finally:
            self.run.predict = own
        return PredictionOutput(seen[0].predictions, seen[0].label_ids, metrics)

    def _check_prepared(self, dataset: Any) -> None:
        """`skip_prepare_dataset` promises tokens; anything else would be prepared after all."""
        if not as_dict(self.args.dataset_kwargs).get("skip_prepare_dataset"):
            return
        first: Mapping[str, Any] = next(iter(dataset), {}) if not isinstance(dataset, str) else {}
        if "input_ids" not in first:
            seen = ", ".join(first) or "a path"
            raise ConfigError(f"skip_prepare_dataset=True needs rows with input_ids (and labels), these have {seen}")

    def _eval_settings(self) -> DataSettings:
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        return dataclasses.replace(self._settings, packing=packing)


def _data_settings(args: SFTConfig, formatting_func: Callable[[dict[str, Any]], str] | None) -> DataSettings:
    return DataSettings(
        format=args.dataset_format,
        text_field=args.dataset_text_field,
        column_map=as_dict(args.dataset_columns),
        formatting_func=formatting_func,
        completion_only=args.completion_only_loss,
        assistant_only=args.assistant_only_loss,
        max_length=None if as_dict(args.dataset_kwargs).get("skip_prepare_dataset") else args.max_length,
        truncation_mode=args.truncation_mode,
        packing=args.packing,
        packing_strategy=args.packing_strategy,
        on_bad_row=args.on_bad_row,
        shuffle=args.shuffle_dataset,
        chat_template=template.name if (template := find_template(args.chat_template_path or "")) else None,
        shuffle_seed=args.seed,
        cache=default_folder() if args.dataset_cache else None,
    )
