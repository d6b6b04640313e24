"""`GRPOTrainer`: TRL 1.16's arguments, posttrain's engine. Completions are sampled on the weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.objectives.policy import PolicyLoss
from posttrain.rollout.advantages import Advantages, group_relative
from posttrain.rollout.generation import Rollout
from posttrain.rollout.source import Learning, Resampling
from posttrain.trainers.grpo_config import GRPOConfig
from posttrain.trainers.online import OnlineTrainer


class GRPOTrainer(OnlineTrainer):
    """Group-relative policy optimisation and its variants. The arguments are `OnlineTrainer`'s."""

    CONFIG = GRPOConfig
    args: GRPOConfig

    def _open(self, model: Any, tokenizer: Any, peft_config: Any, quantization_config: Any) -> None:
        super()._open(model, tokenizer, peft_config, quantization_config)
        self.entropy = self.args.entropy_control()

    def objective(self) -> PolicyLoss:
        objective = self.args.objective()
        return objective if self.entropy is None else replace(objective, entropy_coef=self.entropy.applied)

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
