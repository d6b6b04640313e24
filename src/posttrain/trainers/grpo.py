"""`GRPOTrainer`: TRL 1.16's arguments, posttrain's engine. Completions are sampled on the weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import TrainingArguments

from posttrain.objectives.policy import PolicyLoss
from posttrain.rollout.advantages import Advantages, group_relative
from posttrain.rollout.generation import Rollout
from posttrain.rollout.source import Learning, Resampling
from posttrain.trainers.grpo_config import GRPOConfig
from posttrain.trainers.online import OnlineTrainer
from posttrain.trainers.opening import read_config
from posttrain.trainers.rewards import refuse_online


class GRPOTrainer(OnlineTrainer):
    """Group-relative policy optimisation and its variants.

    Args:
        model: a `PreTrainedModel`, a `PeftModel`, or the name or folder of one.
        reward_funcs: functions `(completions, **columns) -> list of numbers or None` (also asynchronous ones), reward
            models, names of either (`package.module:name`, or a model's), or a list of several.
        args: `GRPOConfig`, or a plain `TrainingArguments`.
        train_dataset, eval_dataset: rows with a `prompt`, text or messages; other columns reach the rewards. The
            evaluation set may be a dict of several.
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        reward_processing_classes: tokenizers of reward models.
        peft_config: an adapter to add.
        rollout_func: `(prompts, trainer) -> {prompt_ids, completion_ids, logprobs, ...}`, in the place of our sampling.
        optimizers, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        **older: Any,
    ):
        processing_class = older.pop("tokenizer", None) or processing_class
        self.args = read_config(GRPOConfig, model, args, older, "GRPOTrainer")
        refuse_online(tools=tools, environment_factory=environment_factory)
        self._open(model, processing_class, peft_config, quantization_config)
        self._start(
            reward_funcs, reward_processing_classes, train_dataset, eval_dataset, callbacks, optimizers, rollout_func
        )

    def objective(self) -> PolicyLoss:
        return self.args.objective()

    def learning(self) -> Learning:
        objective = self.args.objective()
        return Learning(
            whole_batches=not objective.is_sum,
            skips_indifferent=objective.skips_indifferent,
            skips_truncated=self.args.mask_truncated_completions,
        )

    def resampling(self) -> Resampling:
        args = self.args
        attempts = args.max_resampling_rounds if args.dynamic_sampling == "replace" else 0
        return Resampling(args.dynamic_sampling != "none", attempts, args.seed)

    def advantages(self, rewards_NF: np.ndarray, rollouts: Sequence[Rollout], group_size: int) -> Advantages:
        weights_F = np.array(self.rewards.weights, dtype=np.float64)
        return group_relative(
            rewards_NF, weights_F, group_size, self.args.scale_rewards, self.args.multi_objective_aggregation
        )
