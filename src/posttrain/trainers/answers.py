"""What the trainers share that learn from answers to prompts, compared or rated: how they open, and what they refuse.

Not here: images (refused), `compute_metrics` (refused: it would want logits), custom collators.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, set_seed

from posttrain.course import Samples
from posttrain.data.batches import Order
from posttrain.data.cache import default_folder
from posttrain.data.comparisons import contradictions, length_bias
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.templates import find_template
from posttrain.errors import ConfigError
from posttrain.objectives.base import Objective
from posttrain.reference import ReferenceModel
from posttrain.run import Run
from posttrain.session import Session
from posttrain.trainers.arguments import check_arguments
from posttrain.trainers.base import make_events
from posttrain.trainers.config import PackedConfig
from posttrain.trainers.data import DataTrainer
from posttrain.trainers.forewarning import (
    LOOKED_THROUGH,
    Betas,
    Rates,
    warn_of_beta,
    warn_of_rate,
    warn_of_reference,
    warn_of_unlikely_answers,
)
from posttrain.trainers.opening import as_dict, open_model, turn_dropout_off
from posttrain.types import Sample

logger = logging.getLogger("posttrain")
LEAST_SEEN = 0.5
"""Of the rows: where training sees fewer, a copy of all weights costs less than asking the reference about them all."""


@dataclass
class AnswerConfig(PackedConfig):
    """Settings that methods of preference share. `ONLY_WITH` says of a field with which values of another it is heeded:
    set away from its default without them, it is refused."""

    ONLY_WITH: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {}

    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate; 10 to 100 times below what supervised training takes."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off in the model and its adapters."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens: its beginning is cut off. Default: no limit."}
    )

    @property
    def has_schedule(self) -> bool:
        """Whether the objective changes from epoch to epoch."""
        return False

    def objective(self, epoch: float = 0.0) -> Objective:
        """As it is in `epoch`. Raises ConfigError for settings that contradict each other."""
        raise NotImplementedError

    def _check_choices(self) -> None:
        super()._check_choices()
        if self.label_smoothing_factor:
            raise ConfigError(f"label_smoothing_factor={self.label_smoothing_factor} is of supervised training",
                              hint="some of DPO's losses take label_smoothing")  # fmt: skip
        for name, (other, values) in self.ONLY_WITH.items():
            given = getattr(self, other)
            wanted = set(given if isinstance(given, list | tuple) else [given]) & set(values)
            if not wanted and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                which = " or ".join(repr(value) for value in values)
                raise ConfigError(f"{name}={getattr(self, name)!r} is heeded with {other}={which} only")
        self.objective()


@dataclass
class ReferenceConfig(AnswerConfig):
    """Settings of methods with a reference model."""

    ONLY_WITH: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "ref_model_mixup_alpha": ("sync_ref_model", (True,)),
        "ref_model_sync_steps": ("sync_ref_model", (True,)),
    }

    beta: float = field(
        default=0.1, metadata={"help": "How far the policy may leave the reference: less with a larger one."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "An adapter of the model to be the reference."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Ask the reference about all rows before the first step, and keep what it says on disk. Default: "
            "where that saves work or a second copy of the weights."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Accepted; batches hold token_budget tokens."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Let the reference follow the policy (TR-DPO); not with an adapter."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "With sync_ref_model: share of the policy in what the reference becomes."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "With sync_ref_model: every so many steps."})

    def _check_choices(self) -> None:
        super()._check_choices()
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ConfigError(f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} must be in [0, 1]")
        if self.ref_model_sync_steps < 1:
            raise ConfigError(f"ref_model_sync_steps={self.ref_model_sync_steps} must be at least 1")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError("sync_ref_model=True moves the reference, and precompute_ref_log_probs=True asks it once",
                              hint="leave one of them out")  # fmt: skip


class Follow(TrainerCallback):
    """The reference follows the policy as `sync_ref_model` says."""

    def __init__(self, reference: ReferenceModel):
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.follow(args.ref_model_mixup_alpha)


class AnswerTrainer(DataTrainer):
    """Base of the trainers of preference. `method` is the kind of rows they read, `columns` what of a row goes into its
    batch beside the tokens."""

    method: ClassVar[str] = "preference"
    looked_at: ClassVar[int] = LOOKED_THROUGH
    way_out_of_length: ClassVar[str] = "pairs of like length, or a loss per token, keep that out"
    columns: tuple[str, ...] = ()
    rates: ClassVar[Rates] = Rates()
    betas: ClassVar[Betas | None] = None
    args: AnswerConfig

    def _open(self, model: Any, tokenizer: Any, peft_config: Any, quantization_config: Any) -> None:
        """The model and its tokenizer, and how data are to be read. `self.args` stands."""
        args = self.args
        check_arguments(args)
        set_seed(args.seed)  # adapters are initialised at random
        self._model, self._tokenizer = self._opened(model, tokenizer, peft_config, quantization_config)
        warn_of_rate(args, isinstance(self._model, PeftModel), self.rates)
        if self.betas is not None:
            warn_of_beta(args, self.betas)
        if self._tokenizer.chat_template is None:
            logger.warning("the tokenizer has no chat template, as that of a base model; preference methods refine "
                           "what a model can do already")  # fmt: skip
        if args.neftune_noise_alpha:
            logger.info("neftune_noise_alpha: each answer has noise of its own, so none shares its prompt with another")
        if args.disable_dropout:
            turn_dropout_off(self._model)
        self._settings = self._data_settings()
        self.data_reports: dict[str, DataReport] = {}

    def _opened(self, model: Any, tokenizer: Any, peft_config: Any, quantization_config: Any) -> tuple[Any, Any]:
        return open_model(model, tokenizer, self.args, peft_config, quantization_config)

    def _data_settings(self) -> DataSettings:
        args = self.args
        return DataSettings(
            method=self.method,
            format=args.dataset_format,
            column_map=as_dict(args.dataset_columns),
            completion_only=True,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            on_bad_row=args.on_bad_row,
            shuffle=getattr(args, "shuffle_dataset", False),
            shuffle_seed=args.seed,
            columns=self.columns,
            chat_template=template.name if (template := find_template(args.chat_template_path or "")) else None,
            cache=default_folder() if args.dataset_cache else None,
        )

    def _start(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        callbacks: list[Any] | None,
        optimizers: Any,
        *,
        optimizer_choice: Any = None,
        ref_model: Any = None,
        predict: Any = None,
    ) -> None:
        """The run, ready to train."""
        args = self.args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._readers = {"the model": self._model, **({} if ref_model is None else {"ref_model": ref_model})}
        objective = args.objective()
        train_samples = self._train_samples(train_dataset)
        if not objective.needs_reference:
            check_no_reference(ref_model, args)
        if args.has_schedule:
            check_epochs(args, None if callable(train_samples) else len(train_samples))
        self.run = Run(
            model=self._model,
            processing_class=self._tokenizer,
            args=args,
            objective=objective,
            events=make_events(args, callbacks, self._model, self._tokenizer),
            train_samples=train_samples,
            eval_sets=self._eval_sets(eval_dataset),
            token_budget=args.token_budget,
            predict=predict,
            optimizers=optimizers,
            optimizer_choice=optimizer_choice,
            columns=self.columns,
            reference=self._reference(ref_model, train_samples) if objective.needs_reference else None,
            schedule=args.objective if args.has_schedule else None,
            first_look=self._first_look,
        )
        if self.run.reference is not None and self.run.reference.moves:
            self.add_callback(Follow(self.run.reference))
        if args.eval_strategy != IntervalStrategy.NO and not self.run.eval_sets:
            raise ConfigError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset")

    def _prepared(self, dataset: Any, name: str, settings: DataSettings) -> Sequence[Sample]:
        samples = super()._prepared(dataset, name, settings)
        if name == "train":
            for remark in self._remarks(samples):
                logger.warning("data     %s", remark)
        return samples

    def _check_stream(self, dataset: Any) -> None:
        """As ever, and what can be said of the first rows already."""
        super()._check_stream(dataset)
        if not self._beginning:  # an iterator: what it gives is gone then
            return
        for remark in self._remarks(self._beginning, is_whole=False):
            logger.warning("data     of the first %d rows of the stream: %s", len(self._beginning), remark)

    def _remarks(self, samples: Sequence[Sample], *, is_whole: bool = True) -> Iterator[str]:
        """What the rows teach beside what they are meant to. `is_whole`: they are not just the beginning."""
        if remark := contradictions(samples):
            yield remark
        if self.method == "preference" and (remark := length_bias(samples)):
            yield f"{remark}; {self.way_out_of_length}"

    def _first_look(self, session: Session) -> None:
        samples = self.run.train_samples
        warn_of_unlikely_answers(session, self._beginning if callable(samples) else samples)

    def _reference(self, ref_model: Any, train_samples: Samples) -> ReferenceModel:
        """Asked ahead where that saves a pass an epoch, or a copy of all weights; a stream has no rows to ask about."""
        args = self.args
        assert isinstance(args, ReferenceConfig)
        check_adapter(self._model, args.ref_adapter_name)
        check_shares_nothing(self._model, ref_model)
        whole = not isinstance(self._model, PeftModel) and ref_model is None
        precompute = False if args.sync_ref_model else args.precompute_ref_log_probs
        if args.sync_ref_model and (isinstance(self._model, PeftModel) or args.ref_adapter_name):
            raise ConfigError("sync_ref_model=True is not honoured with an adapter: its reference has no weights",
                              hint="train all weights (no peft_config), or leave it out")  # fmt: skip
        if precompute and callable(train_samples):
            raise ConfigError("precompute_ref_log_probs=True needs rows that can be counted, not a stream")
        if precompute is None:
            seen = 0.0 if callable(train_samples) else _epochs(args, len(train_samples))
            precompute = seen > 1 or (whole and seen >= LEAST_SEEN)
        if args.sync_ref_model:
            check_can_follow(self._model, ref_model)
        warn_of_reference(self._model, ref_model, args.ref_adapter_name)
        folder = default_folder().parent / "reference"
        kept = folder if args.dataset_cache else None
        return ReferenceModel(ref_model, args.ref_adapter_name, precompute, kept, moves=args.sync_ref_model)


def check_epochs(args: Any, rows: int | None) -> None:
    """Raises ConfigError where there are more values of beta than epochs. `rows=None`: of a stream."""
    if rows is None:
        raise ConfigError("beta has a value for each epoch, and a stream has but one", hint="give one number")
    epochs = math.ceil(_epochs(args, rows) - 1e-6)
    if len(args.beta) > epochs:
        what = f"beta={list(args.beta)} has values for {len(args.beta)} epochs, and training ends in epoch {epochs}"
        raise ConfigError(what, hint="leave the last ones out, or train longer")


def _epochs(args: AnswerConfig, rows: int) -> float:
    """How often training sees a row."""
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return args.max_steps / max(1, Order(rows, size, steps, None, args.dataloader_drop_last, None).steps_per_epoch)


def check_reference(model: Any, ref_model: Any, args: ReferenceConfig) -> None:
    """Raises ConfigError for a reference that could not serve as one."""
    if ref_model is None:
        return
    check_is_language_model(ref_model)
    if ref_model is model:
        raise ConfigError("ref_model is the very model that is trained: it would follow the policy",
                          hint="leave it out; the starting model is the reference then")  # fmt: skip
    if args.ref_adapter_name is not None:
        raise ConfigError("ref_model and ref_adapter_name both name a reference; give one of them")


def check_is_language_model(ref_model: Any) -> None:
    """Raises ConfigError for a `ref_model` that has nothing to say of tokens."""
    if not isinstance(ref_model, PreTrainedModel | PeftModel):
        raise ConfigError(f"ref_model must be a model, got {type(ref_model).__name__}")
    if ref_model.get_output_embeddings() is None:
        base = ref_model.get_base_model() if isinstance(ref_model, PeftModel) else ref_model
        raise ConfigError(f"ref_model is a {type(base).__name__}, which gives tokens no probabilities",
                          hint="load it with AutoModelForCausalLM")  # fmt: skip


def check_no_reference(ref_model: Any, args: Any) -> None:
    """Raises ConfigError where a reference is spoken of, and the loss asks none."""
    given = {"ref_model": ref_model is not None} | {
        name: bool(getattr(args, name, None)) for name in ("ref_adapter_name", "precompute_ref_log_probs",
                                                           "sync_ref_model")
    }  # fmt: skip
    for name in (name for name, is_given in given.items() if is_given):
        raise ConfigError(f"{name} is not honoured with loss_type={args.loss_type!r}: it asks no reference",
                          hint="leave it out")  # fmt: skip


def check_adapter(model: Any, name: str | None) -> None:
    """Raises ConfigError where adapter `name` cannot be the reference."""
    if name is None:
        return
    known = list(model.peft_config) if isinstance(model, PeftModel) else []
    if name not in known:
        there = f"it has {', '.join(known)}" if known else "it has no adapter"
        raise ConfigError(f"ref_adapter_name={name!r} is no adapter of the model", hint=there)
    if name in model.active_adapters:
        raise ConfigError(f"ref_adapter_name={name!r} is the adapter that is trained: it would follow the policy",
                          hint="load the same adapter again under another name, or leave it out")  # fmt: skip


def check_shares_nothing(model: Any, ref_model: Any) -> None:
    """Raises ConfigError where the reference is made of the policy's own layers."""
    if ref_model is not None and shares_layers(model, ref_model):
        raise ConfigError("ref_model has layers of the model that is trained: it would follow the policy",
                          hint="leave it out; with an adapter the model without it is the reference")  # fmt: skip


def check_can_follow(model: Any, ref_model: Any) -> None:
    """Raises ConfigError where a reference of its own has no place for what the policy becomes."""
    if ref_model is None:
        return
    places = {name: parameter.shape for name, parameter in ref_model.named_parameters()}
    hint = "give a ref_model of the same kind (no adapter, embeddings tied alike), or leave it out"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and places.get(name) != parameter.shape:
            there = f"of shape {tuple(places[name])}" if name in places else "missing"
            raise ConfigError(
                f"sync_ref_model=True wants a reference like the model: {name} of shape {tuple(parameter.shape)} is "
                f"{there} in ref_model",
                hint=hint,
            )
    if surplus := sorted(places.keys() - dict(model.named_parameters()).keys()):
        raise ConfigError(f"sync_ref_model=True wants a reference like the model, which has no {surplus[0]} to follow",
                          hint=hint)  # fmt: skip


def shares_layers(one: Any, other: Any) -> bool:
    own = {id(parameter) for parameter in one.parameters()}
    return any(id(parameter) in own for parameter in other.parameters())
