"""`SFTTrainer`: TRL 1.16's arguments, posttrain's engine.

Not here: images (refused), `compute_loss_func` and custom collators (a loss is an objective; batches are packed, so
there is nothing to collate).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import (
    EvalPrediction,
    IntervalStrategy,
    PredictionOutput,
    align_special_tokens,
    set_seed,
)

from posttrain.data.cache import default_folder
from posttrain.data.mixing import Mixture
from posttrain.data.prepare import prepare, stream
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import source_name
from posttrain.data.templates import find_template
from posttrain.errors import ConfigError, DataError
from posttrain.evaluate.predictions import Predictor
from posttrain.models import adapters
from posttrain.models.load import load_model, load_tokenizer, set_eos_token, set_pad_token
from posttrain.objectives.sft import SupervisedLoss
from posttrain.run import Run
from posttrain.trainers.arguments import check_arguments
from posttrain.trainers.base import PackedTrainer, make_events
from posttrain.trainers.config import SFTConfig
from posttrain.trainers.spellings import TRAINER_GONE, TRAINER_TO_CONFIG, say_read_as
from posttrain.trainers.templates import take_template
from posttrain.types import Sample

logger = logging.getLogger("posttrain")


class SFTTrainer(PackedTrainer):
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
        self.args = args = _config(model, args, older)
        _refuse(data_collator=data_collator, compute_loss_func=compute_loss_func)
        check_arguments(args)
        if optimizer_cls_and_kwargs is not None and optimizers[0] is not None:
            raise ConfigError("optimizers and optimizer_cls_and_kwargs both name an optimiser; give one of them")
        set_seed(args.seed)  # adapters are initialised at random
        model, processing_class = _open_model(model, processing_class, args, peft_config, quantization_config)
        self._settings = _data_settings(args, formatting_func)
        self._tokenizer, self._model = processing_class, model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_reports: dict[str, DataReport] = {}
        self._compute_metrics, self._preprocess_logits = compute_metrics, preprocess_logits_for_metrics
        predictor = Predictor(args, compute_metrics, preprocess_logits_for_metrics) if compute_metrics else None
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

        args = dataclasses.replace(self.args, prediction_loss_only=False, batch_eval_metrics=False)
        self.run.predict = Predictor(args, collect, self._preprocess_logits)
        try:
            sets = self._eval_sets(test_dataset)
            metrics = self.run.evaluate(sets, prefix=metric_key_prefix, logged=False)
        finally:
            self.run.predict = own
        return PredictionOutput(seen[0].predictions, seen[0].label_ids, metrics)

    # --- data -------------------------------------------------------------------------------------------------------

    def _train_samples(self, dataset: Any) -> Sequence[Sample] | Callable[[int], Iterator[Sample]]:
        if dataset is None:
            raise ConfigError("train_dataset is required")
        self._check_prepared(dataset)
        if _is_stream(dataset) or self.args.dataset_streaming:
            self._check_stream(dataset)
            return lambda number: self._stream(dataset, number)
        return self._prepared(dataset, "train", self._settings)

    def _check_ids(self, samples: Sequence[Sample]) -> None:
        """A tokenizer may know more tokens than the model (Gemma 3's does), as long as the rows have none of them; and
        positions that are learned (GPT-2's) come to an end."""
        longest = max((part.num_tokens for sample in samples for part in sample), default=0)
        for name, module in self._model.named_modules():
            learned = name.endswith(("wpe", "embed_positions", "position_embeddings"))
            if learned and isinstance(module, nn.Embedding) and longest > module.num_embeddings:
                places = module.num_embeddings
                raise ConfigError(f"a row has {longest} tokens, the model {places} places", hint=f"max_length={places}")
        rows = self._model.get_input_embeddings().weight.shape[0]
        for part in (part for sample in samples for part in sample):
            highest = max((int(branch.ids.max()) for branch in part.branches if len(branch.ids)), default=0)
            if highest >= rows:
                raise ConfigError(
                    f"{part.origin} has token {highest}, and the model embeddings for {rows} tokens only",
                    hint="model.resize_token_embeddings(len(tokenizer)), or the tokenizer that belongs to the model",
                )

    def _stream(self, dataset: Any, number: int) -> Iterator[Sample]:
        """Pass `number` over it, in an order of its own where it is shuffled; `data_reports` counts along."""
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(number)
        settings = dataclasses.replace(self._settings, shuffle_seed=self._settings.shuffle_seed + number)
        report = self.data_reports["train"] = DataReport(source_name(dataset, "train"))
        return stream(dataset, self._tokenizer, settings, "train", report)

    def _check_stream(self, dataset: Any) -> None:
        """The first rows, now: a stream is read when training begins, which is late to learn of a wrong format."""
        if isinstance(dataset, Iterator):  # what it gives is gone then
            return
        report = DataReport(source_name(dataset, "train"))
        settings = dataclasses.replace(self._settings, packing=False, shuffle=False)
        if next(stream(dataset, self._tokenizer, settings, "train", report), None) is None:
            raise DataError(f"{report.source} has no usable row", code="E-DATA-0031")
        logger.info("data     %s is read as training goes; %s", report.source, "; ".join(report.formats))

    def _check_prepared(self, dataset: Any) -> None:
        """`skip_prepare_dataset` promises tokens; anything else would be prepared after all."""
        if not _as_dict(self.args.dataset_kwargs).get("skip_prepare_dataset"):
            return
        first: Mapping[str, Any] = next(iter(dataset), {}) if not isinstance(dataset, str) else {}
        if "input_ids" not in first:
            seen = ", ".join(first) or "a path"
            raise ConfigError(f"skip_prepare_dataset=True needs rows with input_ids (and labels), these have {seen}")

    def _eval_sets(self, dataset: Any) -> dict[str, Sequence[Sample]]:
        if dataset is None:
            return {}
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        settings = dataclasses.replace(self._settings, packing=packing)
        several = dataset if isinstance(dataset, Mapping) else {"": dataset}
        return {name: self._prepared(one, name or "eval", settings) for name, one in several.items()}

    def _prepared(self, dataset: Any, name: str, settings: DataSettings) -> Sequence[Sample]:
        if _is_stream(dataset):
            samples = list(stream(dataset, self._tokenizer, settings, name))
            if not samples:
                raise DataError(f"the {name} stream has no usable rows", code="E-DATA-0031")
            return samples
        prepared = prepare(dataset, self._tokenizer, settings, name)
        self._check_ids(prepared.samples)
        self.data_reports[name] = prepared.report
        lost = prepared.report.num_skipped or prepared.report.truncated.count
        logger.log(logging.WARNING if lost else logging.INFO, "data     %s", prepared.report.summary())
        for note in prepared.report.notes():
            logger.info("         %s", note)
        return prepared.samples


def _config(model: Any, args: TrainingArguments | None, older: dict[str, Any]) -> SFTConfig:
    """`args` as an `SFTConfig`, with what was once given to the trainer itself."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ConfigError(f"model must be a transformers or PEFT model, or the name of one, got {type(model).__name__}")
    moved = {}
    for name in list(older):
        if name in TRAINER_TO_CONFIG:
            moved[TRAINER_TO_CONFIG[name]] = older.pop(name)
            say_read_as(name, {f"args.{TRAINER_TO_CONFIG[name]}": moved[TRAINER_TO_CONFIG[name]]})
        elif name in TRAINER_GONE:
            older.pop(name)
            say_read_as(name, {})
    if older:
        raise TypeError(f"SFTTrainer() got an unexpected argument {next(iter(older))!r}")
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        args = SFTConfig(f"{name.rstrip('/').split('/')[-1]}-SFT")
    if not isinstance(args, TrainingArguments):
        raise ConfigError(f"args must be an SFTConfig or a TrainingArguments, got {type(args).__name__}")
    if not isinstance(args, SFTConfig):
        known = {f.name for f in dataclasses.fields(SFTConfig)}
        fields = [f for f in dataclasses.fields(args) if f.init]
        for field in fields:
            if field.name not in known and getattr(args, field.name) != field.default:
                raise ConfigError(f"args.{field.name} of {type(args).__name__} is no setting of SFTConfig")
        args = SFTConfig(**{f.name: getattr(args, f.name) for f in fields if f.name in known})
    return dataclasses.replace(args, **moved) if moved else args


def _refuse(**given: Any) -> None:
    instead = {
        "data_collator": "batches are packed; put the labels into the dataset (input_ids, labels)",
        "compute_loss_func": "write an objective (posttrain.objectives)",
    }
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} is not honoured: {instead[name]}")


def _open_model(
    model: Any, tokenizer: Any, args: SFTConfig, peft_config: Any, quantization_config: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    if quantization_config is not None:
        raise ConfigError("quantization_config is not honoured yet: QLoRA is not built")
    if isinstance(model, str):
        name, options = model, _as_dict(args.model_init_kwargs)
        model = load_model(name, options, dtype=_dtype_to_load(args, peft_config))
        tokenizer = tokenizer or load_tokenizer(name, options)
    elif args.model_init_kwargs is not None:
        raise ConfigError("model_init_kwargs is not honoured: the model is loaded already")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.get_output_embeddings() is None or not hasattr(base, "generation_config"):
        raise ConfigError(f"{type(base).__name__} is no causal language model: it has no head that says the next token",
                          hint="AutoModelForCausalLM loads one")  # fmt: skip
    if tokenizer is None and not model.config._name_or_path:
        raise ConfigError("processing_class is needed: the model does not say where its tokenizer lies",
                          hint="pass the tokenizer as processing_class")  # fmt: skip
    tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"processing_class must be a tokenizer, got {type(tokenizer).__name__}; images are not supported"
        )
    if args.eos_token is not None:
        set_eos_token(model, tokenizer, args.eos_token)
    added = take_template(model, tokenizer, args.chat_template_path) if args.chat_template_path else []
    if peft_config is not None:
        if added:
            _train_added_tokens(peft_config, added)
        model = adapters.add_adapter(model, peft_config)
    set_pad_token(model, tokenizer, args.pad_token)
    align_special_tokens(model, tokenizer)  # what ends a turn in training ends it in generation
    return model, tokenizer


def _dtype_to_load(args: SFTConfig, peft_config: Any) -> str:
    """fp32 where all of it is trained. Frozen weights in the dtype they are computed in, so that no second copy lies
    beside them; as they are on disk where some of them are trained after all."""
    if peft_config is None:
        return "float32"
    trains_more = getattr(peft_config, "modules_to_save", None) or getattr(peft_config, "trainable_token_indices", None)
    return "bfloat16" if args.bf16 and not trains_more else "auto"


def _as_dict(given: dict[str, Any] | str | None) -> dict[str, Any]:
    return dict(given) if isinstance(given, dict) else {}  # transformers has parsed a string into a dict by now


def _train_added_tokens(peft_config: Any, added: list[int]) -> None:
    """New tokens have random embeddings: train those rows, and the head that must learn to say them."""
    indices = peft_config.trainable_token_indices or {}
    indices.setdefault("embed_tokens", []).extend(added)
    peft_config.trainable_token_indices = indices
    kept = list(peft_config.modules_to_save or [])
    if "lm_head" not in kept:
        logger.warning("the chat template added tokens; lm_head is trained whole so that the model can say them")
        peft_config.modules_to_save = [*kept, "lm_head"]


def _data_settings(args: SFTConfig, formatting_func: Callable[[dict[str, Any]], str] | None) -> DataSettings:
    return DataSettings(
        format=args.dataset_format,
        text_field=args.dataset_text_field,
        column_map=_as_dict(args.dataset_columns),
        formatting_func=formatting_func,
        completion_only=args.completion_only_loss,
        assistant_only=args.assistant_only_loss,
        max_length=None if _as_dict(args.dataset_kwargs).get("skip_prepare_dataset") else args.max_length,
        truncation_mode=args.truncation_mode,
        packing=args.packing,
        packing_strategy=args.packing_strategy,
        on_bad_row=args.on_bad_row,
        shuffle=args.shuffle_dataset,
        chat_template=template.name if (template := find_template(args.chat_template_path or "")) else None,
        shuffle_seed=args.seed,
        cache=default_folder() if args.dataset_cache else None,
    )


def _is_stream(dataset: Any) -> bool:
    if isinstance(dataset, Mixture):
        return dataset.is_stream
    return isinstance(dataset, Iterable) and not hasattr(dataset, "__len__")
