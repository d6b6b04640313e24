"""`PPOTrainer`: the arguments of TRL's, posttrain's engine. The value function is a head on the policy's own layers, or
a model of its own.

Left out: encoder-decoder models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from posttrain.errors import ConfigError
from posttrain.evaluate.validation import check_validated
from posttrain.models.critic import ValueHead, ValueModel
from posttrain.models.load import load_model
from posttrain.models.scoring import as_classifier, is_classifier
from posttrain.objectives.ppo import PPOLoss
from posttrain.reference import ReferenceModel
from posttrain.rewards.functions import RewardError, weighted_sum
from posttrain.rewards.models import RewardModel
from posttrain.rollout.advantages import Advantages
from posttrain.rollout.credit import credit
from posttrain.rollout.generation import Rollout
from posttrain.rollout.source import Learning
from posttrain.trainers.answers import (
    check_adapter,
    check_can_follow,
    check_is_language_model,
    check_shares_nothing,
    shares_layers,
)
from posttrain.trainers.online import OnlineTrainer
from posttrain.trainers.opening import as_dict, read_config, refuse, turn_dropout_off
from posttrain.trainers.ppo_config import PPOConfig


class PPOTrainer(OnlineTrainer):
    """Proximal policy optimisation: a policy and what it expects, learned together.

    Args:
        args: `PPOConfig`, or a plain `TrainingArguments` (`config=` is read as this).
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        model: a `PreTrainedModel`, a `PeftModel`, or the name or folder of one (`policy=` is read as this).
        ref_model: the reference; default: the model as training finds it, with an adapter the model without it.
        reward_model: a sequence-classification model with one label, or the folder or name of one, with a validation
            record (`posttrain eval --reward-model M --data D` writes it); or a reward function, which needs none.
        train_dataset, eval_dataset: rows with a `prompt`, text or messages; other columns reach the rewards.
        value_model: a sequence-classification model with one label (or a causal one, which is given a score), or the
            name or folder of one, trained beside the policy; default: a head on the policy's own layers, which costs
            next to nothing.
        peft_config: an adapter to add.
        reward_funcs: more rewards, one or a list, as `GRPOTrainer` takes them; their weighted sum is the score.
        reward_processing_classes: tokenizers of reward models, those of `reward_funcs` first.
        rollout_func: `(prompts, trainer) -> {prompt_ids, completion_ids, logprobs, ...}`, in the place of our sampling.
        optimizers, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    CONFIG = PPOConfig
    args: PPOConfig
    of_policy: ClassVar[tuple[str, ...]] = ("old_logp_R", "old_value_R")

    def __init__(
        self,
        args: TrainingArguments | None = None,
        processing_class: Any = None,
        model: Any = None,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        rollout_func: Any = None,
        quantization_config: Any = None,
        **older: Any,
    ):
        args = older.pop("config", None) or args
        model = older.pop("policy", None) or model or getattr(args, "sft_model_path", None)
        ref_model = older.pop("ref_policy", None) or ref_model
        processing_class = older.pop("tokenizer", None) or processing_class
        self.args = read_config(PPOConfig, model, args, older, "PPOTrainer")
        refuse(data_collator=data_collator)
        self._open(model, processing_class, peft_config, quantization_config)
        self._ref_model = _reference(self._model, ref_model, self.args)
        self.kl = self.args.control()
        value_model = self.args.value_model_path if value_model is None else value_model
        if value_model is None:
            self.critic = ValueHead(_value_head(self._model))
        else:
            self.critic = ValueModel(self._open_value_model(value_model))
        rewards, tokenizers = self._rewards(reward_model, reward_funcs, reward_processing_classes)
        self._start(rewards, tokenizers, train_dataset, eval_dataset, callbacks, optimizers, rollout_func)
        for given, one in zip(rewards, self.reward_funcs, strict=True):
            if isinstance(one, RewardModel):
                if self.value_model is not None and shares_layers(self.value_model, one.model):
                    raise ConfigError("value_model has layers of the reward model, which would change as it is trained",
                                      hint="load the same model twice")  # fmt: skip
                name = given if isinstance(given, str) else str(one.config._name_or_path or "")
                check_validated(one.model, name, self.args.reward_validation, self.args.reward_validation_accuracy,
                                self.args.reward_validation_pairs)  # fmt: skip

    @property
    def value_head(self) -> nn.Linear | None:
        """What says values, on the policy's own layers; None with a value model."""
        return self.critic.module if isinstance(self.critic, ValueHead) else None

    @property
    def value_model(self) -> Any:
        """What says values, a model of its own; None with a head on the policy's layers."""
        return self.critic.module if isinstance(self.critic, ValueModel) else None

    def _open_value_model(self, given: Any) -> Any:
        """Raises ConfigError for what is no model with one score over the policy's vocabulary."""
        if isinstance(given, str):
            given = load_model(given, as_dict(self.args.model_init_kwargs), dtype="float32", scorer=True)
        if not isinstance(given, PreTrainedModel | PeftModel):
            raise ConfigError(f"value_model must be a model or the name of one, got {type(given).__name__}")
        base = given.get_base_model() if isinstance(given, PeftModel) else given
        if not is_classifier(base) or base.config.get_text_config().num_labels != 1:
            if isinstance(given, PeftModel):
                raise ConfigError("value_model is an adapter of a model without a score",
                                  hint="AutoModelForSequenceClassification(num_labels=1) has one")  # fmt: skip
            given = base = as_classifier(given)
        if not any(parameter.requires_grad for parameter in base.score.parameters()):
            raise ConfigError("value_model's score is frozen: it would go on saying what it says now",
                              hint="leave it unfrozen; of an adapter, LoraConfig(task_type='SEQ_CLS') trains it "
                              "too")  # fmt: skip
        if self._ref_model is not None and shares_layers(self._ref_model, given):
            raise ConfigError("value_model has layers of ref_model, which stays as it is", hint="load the model twice")
        if shares_layers(self._model, given):
            raise ConfigError("value_model has layers of the policy, which would be trained twice over",
                              hint="leave it out: a head on the policy's own layers is the default")  # fmt: skip
        _check_knows_tokens("value_model", base, self._model)
        if self.args.disable_dropout:
            turn_dropout_off(given)
        return given

    def _rewards(self, reward_model: Any, reward_funcs: Any, tokenizers: Any) -> tuple[list[Any], list[Any]]:
        """All of them in one list, with the tokenizer of each; a model that does not say where its own lies reads what
        the policy does, as in TRL."""
        reward_model = self.args.reward_model_path if reward_model is None else reward_model
        given = [one for part in (reward_funcs, reward_model) for one in _as_list(part)]
        if not given:
            raise ConfigError("reward_model is needed: what is a completion worth?",
                              hint="a reward model, its folder, or a function (completions, **columns) -> list of "
                              "numbers")  # fmt: skip
        of_each = _as_list(tokenizers) or [None] * len(given)
        if len(of_each) != len(given):
            raise ConfigError(f"reward_processing_classes has {len(of_each)} entries for {len(given)} rewards")
        own = self._tokenizer
        return given, [
            own
            if tokenizer is None and isinstance(one, PreTrainedModel) and not one.config._name_or_path
            else tokenizer
            for one, tokenizer in zip(given, of_each, strict=True)
        ]

    @property
    def logps_first(self) -> bool:
        return True

    def objective(self) -> PPOLoss:
        return self.args.objective()

    def learning(self) -> Learning:
        return Learning(skips_indifferent=False, skips_truncated=self.args.mask_truncated_completions, own_tokens=True)

    def advantages(self, rewards_NF: np.ndarray, rollouts: Sequence[Rollout], group_size: int) -> Advantages:
        score_N = weighted_sum(rewards_NF, np.array(self.rewards.weights, dtype=np.float64))
        if missing := int(np.isnan(score_N).sum()):
            raise RewardError(f"no reward says anything of {missing} of {len(score_N)} completions, and PPO learns "
                              "from a score of each", hint="give it numbers")  # fmt: skip
        coef = self.args.kl_coef if self.kl is None else self.kl.coef
        return credit(score_N, rollouts, coef, self.args.credit())

    def _readers(self) -> list[Any]:
        return [*super()._readers(), *([] if self._ref_model is None else [self._ref_model])]

    def _reference(self) -> ReferenceModel:
        made = super()._reference()
        made.model, made.adapter = self._ref_model, self.args.ref_adapter_name
        return made


def _reference(model: Any, ref_model: Any, args: PPOConfig) -> Any:
    """Raises ConfigError for a reference that could not serve as one."""
    check_adapter(model, args.ref_adapter_name)
    if ref_model is None:
        return None
    check_is_language_model(ref_model)
    if not args.kl_coef:
        raise ConfigError("ref_model is not honoured with kl_coef=0: nothing is asked of it", hint="leave it out")
    if args.ref_adapter_name is not None:
        raise ConfigError("ref_model and ref_adapter_name both name a reference; give one of them")
    check_shares_nothing(model, ref_model)
    if args.sync_ref_model:
        check_can_follow(model, ref_model)
    _check_knows_tokens("ref_model", ref_model, model)
    return ref_model


def _check_knows_tokens(name: str, reader: Any, model: Any) -> None:
    """Whether `reader` can be asked about whatever the policy says. Raises ConfigError."""
    own, other = (one.get_input_embeddings().weight.shape[0] for one in (model, reader))
    if other < own:
        raise ConfigError(f"{name} knows {other} tokens, the policy says {own}",
                          hint="take one with the policy's tokenizer")  # fmt: skip


def _value_head(model: Any) -> nn.Linear:
    """Expects nothing at first, so that the first advantages are the rewards to come."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = nn.Linear(base.config.get_text_config().hidden_size, 1, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]
