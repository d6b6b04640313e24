"""`ORPOTrainer` and `ORPOConfig`: TRL 1.16's arguments, posttrain's engine. No reference model.

Pairs are tokenised as for DPO, whatever the method: TRL's ORPO puts a BOS token before conversations whose template
writes none, which the model would not see when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from posttrain.errors import ConfigError
from posttrain.objectives.orpo import OddsRatioLoss
from posttrain.trainers.answers import AnswerConfig, AnswerTrainer
from posttrain.trainers.config import accepts_old_spellings
from posttrain.trainers.forewarning import Betas, Rates
from posttrain.trainers.opening import read_config, refuse

NOT_HONOURED = {
    "max_completion_length": "answers are limited by max_length, together with their prompt",
    "generate_during_eval": "nothing is generated in evaluation",
    "is_encoder_decoder": "causal language models are trained here",
}


@accepts_old_spellings
@dataclass
class ORPOConfig(AnswerConfig):
    """Settings of odds-ratio preference optimisation. Raises ConfigError for one that is not honoured, naming it."""

    beta: float = field(default=0.1, metadata={"help": "Weight of the odds ratio beside the supervised loss."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Refused: max_length limits answers."})
    generate_during_eval: bool = field(default=False, metadata={"help": "Refused: nothing is generated."})
    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "Refused: causal models only."})
    padding_value: int | None = field(default=None, metadata={"help": "Accepted; nothing is padded."})

    def _check_choices(self) -> None:
        super()._check_choices()
        for name, why in NOT_HONOURED.items():
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not honoured: {why}")

    def objective(self, epoch: float = 0.0) -> OddsRatioLoss:
        return OddsRatioLoss(self.beta)


class ORPOTrainer(AnswerTrainer):
    """Supervised training and preference in one.

    Args:
        model: a `PreTrainedModel`, a `PeftModel`, or the name or folder of one.
        args: `ORPOConfig`, or a plain `TrainingArguments`.
        train_dataset, eval_dataset: pairs, as for `DPOTrainer`.
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        peft_config: an adapter to add.
        optimizers, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    method: ClassVar[str] = "preference"
    rates: ClassVar[Rates] = Rates(2e-5, 2e-4, "5e-6 to 1e-5", "2e-5 to 1e-4")
    betas: ClassVar[Betas | None] = Betas(
        0.01, 1.0, "0.1", "the comparison hardly counts", "the supervised loss hardly counts"
    )
    args: ORPOConfig

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        **older: Any,
    ):
        processing_class = older.pop("tokenizer", None) or processing_class
        self.args = read_config(ORPOConfig, model, args, older, "ORPOTrainer")
        refuse(
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            model_init=model_init,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._open(model, processing_class, peft_config, None)
        self._start(train_dataset, eval_dataset, callbacks, optimizers)
