"""`RewardTrainer` and `RewardConfig`: TRL 1.16's arguments, posttrain's engine.

The model is a causal language model, which gets a score in the place of its head, or a sequence-classification model
with one label; that is what is saved, with a list of the pairs that it was trained on, and a validation record where it
was evaluated on others. Pairs with an answer longer than `max_length` are left out, for an answer's score is read at
its end. A column `margin` says by how much the chosen answer is better; a set without it has margins of 0.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from posttrain.data.codes import bad_row
from posttrain.data.margins import check_alike
from posttrain.data.planning import Packing
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError
from posttrain.evaluate.learned import held_out, pair_hash, read_learned, write_learned
from posttrain.evaluate.rewards import judge_scores, score_pairs
from posttrain.evaluate.validation import NAME, Validation, hash_of_weights, validation_of
from posttrain.models import adapters
from posttrain.models.load import load_model, load_tokenizer, set_pad_token
from posttrain.models.scoring import as_classifier, is_classifier
from posttrain.objectives.reward import RewardLoss
from posttrain.planner import default_token_budget
from posttrain.session import Session
from posttrain.trainers.answers import AnswerConfig, AnswerTrainer
from posttrain.trainers.config import PackedConfig, accepts_old_spellings
from posttrain.trainers.forewarning import Rates
from posttrain.trainers.opening import as_dict, dtype_to_load, open_model, read_config, refuse
from posttrain.types import Branch, Sample

logger = logging.getLogger("posttrain")


@accepts_old_spellings
@dataclass
class RewardConfig(AnswerConfig):
    """Settings of reward modelling. Raises ConfigError for one that is not honoured, naming it."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {**PackedConfig.CHOICES, "truncation_mode": ("drop",)}

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate; 1e-5 for all weights."})
    truncation_mode: str = field(default="drop", metadata={"help": "Only 'drop': pairs over max_length are left out."})
    eos_token: str | None = field(default=None, metadata={"help": "End-of-sequence token to use."})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of a pull of all scores towards zero; 0.01 is usual."}
    )

    def objective(self, epoch: float = 0.0) -> RewardLoss:
        return RewardLoss(self.center_rewards_coefficient)


class RewardTrainer(AnswerTrainer):
    """A reward model, from pairs.

    Args:
        model: a causal language model or a sequence-classification model with one label, a `PeftModel` of the latter,
            or the name or folder of one.
        args: `RewardConfig`, or a plain `TrainingArguments`.
        train_dataset, eval_dataset: pairs, as for `DPOTrainer`, with or without a number `margin`.
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        peft_config: an adapter to add; the score is trained whole beside it.
        optimizers, optimizer_cls_and_kwargs, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    way_out_of_length: ClassVar[str] = "look at length_correlation when it is evaluated"
    columns: tuple[str, ...] = ("margin",)
    rates: ClassVar[Rates] = Rates(5e-5, 5e-4, "1e-5", "1e-4")
    args: RewardConfig

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        **older: Any,
    ):
        processing_class = older.pop("tokenizer", None) or processing_class
        self.args = read_config(RewardConfig, model, args, older, "RewardTrainer")
        refuse(
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if optimizer_cls_and_kwargs is not None and optimizers[0] is not None:
            raise ConfigError("optimizers and optimizer_cls_and_kwargs both name an optimiser; give one of them")
        self._open(model, processing_class, peft_config, quantization_config)
        self._start(
            train_dataset,
            eval_dataset,
            callbacks,
            optimizers,
            optimizer_choice=optimizer_cls_and_kwargs,
            predict=self._judge,
        )
        self.run.keeper.beside = self._write_beside
        self._learned: set[str] = set()
        self._validations: dict[str, Validation] = {}
        self._saved: set[Path] = set()
        if name := model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", None) or ""):
            self.learned_before(Path(name))

    def _opened(self, model: Any, tokenizer: Any, peft_config: Any, quantization_config: Any) -> tuple[Any, Any]:
        args = self.args
        if isinstance(model, str):
            name, options = model, as_dict(args.model_init_kwargs)
            model = load_model(name, options, dtype=dtype_to_load(args, peft_config), scorer=True)
            tokenizer = tokenizer or load_tokenizer(name, options)
            args = dataclasses.replace(args, model_init_kwargs=None)
        if isinstance(model, PeftModel) and peft_config is None and is_classifier(model.get_base_model()):
            tokenizer = _only_tokenizer(tokenizer, model, args)
        elif is_classifier(model):
            model, tokenizer = as_classifier(model), _only_tokenizer(tokenizer, model, args)
        elif isinstance(model, PeftModel):
            raise ConfigError("an adapter of a language model cannot become a reward model's",
                              hint="merge it (model.merge_and_unload()), then give peft_config")  # fmt: skip
        else:
            model, tokenizer = open_model(model, tokenizer, args, None, quantization_config)
            model = as_classifier(model)
        set_pad_token(model, tokenizer, args.pad_token)
        return model if peft_config is None else adapters.add_adapter(model, _with_score(peft_config)), tokenizer

    # --- what it is trusted for -------------------------------------------------------------------------------------

    def before_training(self) -> None:
        """As ever, and what is learned from now on is no longer held out."""
        super().before_training()
        self._saved.clear()
        if not callable(self.run.train_samples):  # a stream says what it gives
            self._learned |= {pair_hash(sample) for sample in self.run.train_samples}

    def learned_before(self, folder: Path) -> bool:
        """What the reward model saved in `folder` was trained on is not held out here either; whether it is said."""
        learned = read_learned(folder)
        self._learned |= learned or set()
        return learned is not None

    def held_out(self, samples: Sequence[Sample]) -> list[int]:
        """Places of the pairs that prove something: not trained on, each of them once."""
        return held_out(samples, self._learned)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ever; what was saved of these weights gets a record of it (`reward_validation.json`)."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.validation is None:
            logger.warning("all of these pairs were trained on: the reward model has no validation record still")
        for folder in self._saved:
            self._write_validation(folder)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self._saved.add(Path(output_dir or str(self.args.output_dir)))

    @property
    def validation(self) -> Validation | None:
        """What held-out pairs say of the weights as they are."""
        return self._validations.get(hash_of_weights(self.run.model)) if self._validations else None

    def _write_beside(self, folder: Path) -> None:
        if self._learned:
            write_learned(self._learned, folder)
        self._write_validation(folder)

    def _write_validation(self, folder: Path) -> None:
        if (found := self.validation) is not None:
            found.write(folder / NAME)

    # --- data -------------------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, name: str, settings: DataSettings) -> Sequence[Sample]:
        given = [self._readable(sample, name) for sample in super()._prepared(dataset, name, settings)]
        samples = [sample for sample in given if sample is not None]
        if not samples:
            raise DataError(f"{name}: no pair is left that has a score", code="E-DATA-0031")
        check_alike(samples)
        return samples

    def _first_look(self, session: Session) -> None:
        """A model that scores answers has no likelihood of them."""

    def _stream(self, dataset: Any, number: int) -> Iterator[Sample]:
        first: Sample | None = None
        for sample in super()._stream(dataset, number):
            readable = self._readable(sample, "train")
            if readable is None:
                continue
            first = first or readable
            check_alike((first, readable))
            self._learned.add(pair_hash(readable))
            yield readable

    def _readable(self, sample: Sample, name: str) -> Sample | None:
        """Without the padding tokens behind its answers: transformers reads the score before them. None for a pair that
        has none and is to be skipped."""
        (pair,) = sample
        pad = self._tokenizer.pad_token_id
        branches = tuple(_without_end(branch, pad) for branch in pair.branches)
        if not all(len(branch.ids) for branch in branches):
            error = bad_row("E-DATA-0022", pair.origin, "has an answer of padding tokens only, which has no score")
            if self.args.on_bad_row == "error":
                raise error
            logger.warning("data     skipped: %s", error.message)
            if (report := self.data_reports.get(name)) is not None:
                report.skip(error, pair.origin)
                report.used -= 1
            return None
        return (dataclasses.replace(pair, branches=branches),)

    def _judge(self, session: Any, samples: Sequence[Sample], prefix: str) -> dict[str, float]:
        policy = session.policy
        budget = self.args.token_budget or default_token_budget(policy.device)
        score_P2 = score_pairs(policy, samples, budget, Packing(shared=policy.shares_prompts))
        if places := self.held_out(samples):
            right_P = score_P2[places, 0] > score_P2[places, 1]
            with session.precision.exported():
                found = validation_of(self.run.model, [samples[place] for place in places], right_P)
            before = self._validations.get(found.weights)
            if before is None or before.n <= found.n:  # of several sets the largest
                self._validations[found.weights] = found
        judged = judge_scores(score_P2, samples)
        return {f"{prefix}_{name}": value for name, value in judged.items()}


def _without_end(branch: Branch, pad: int | None) -> Branch:
    told = np.flatnonzero(branch.ids != pad)
    end = int(told[-1]) + 1 if len(told) else 0
    return Branch(branch.ids[:end], branch.supervised[:end])


def _only_tokenizer(tokenizer: Any, model: Any, args: RewardConfig) -> PreTrainedTokenizerBase:
    """Of a model that scores already: nothing is generated, so only the tokenizer is set up."""
    tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"processing_class must be a tokenizer, got {type(tokenizer).__name__}")
    for name in ("chat_template_path", "eos_token"):
        if getattr(args, name) is not None:
            raise ConfigError(f"{name}={getattr(args, name)!r} is not honoured: the reward model has its tokenizer",
                              hint="set it up and pass it as processing_class")  # fmt: skip
    return tokenizer


def _with_score(peft_config: Any) -> Any:
    """`peft_config` for a model with a score, which is new and must be learned whole."""
    kept = list(getattr(peft_config, "modules_to_save", None) or [])
    made = copy.deepcopy(peft_config)  # PEFT adds names to its list
    if str(getattr(peft_config, "task_type", None)).endswith("SEQ_CLS"):
        return made
    logger.info("the score is trained whole beside the adapter (task_type SEQ_CLS)")
    made.task_type, made.modules_to_save = "SEQ_CLS", [*kept, *([] if "score" in kept else ["score"])]
    return made
