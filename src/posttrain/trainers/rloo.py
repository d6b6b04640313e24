"""`RLOOTrainer` and `RLOOConfig`: TRL 1.16's arguments, posttrain's engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from posttrain.errors import ConfigError
from posttrain.objectives.rloo import LeaveOneOutLoss
from posttrain.rewards.functions import weighted_sum
from posttrain.rollout.advantages import Advantages, leave_one_out
from posttrain.rollout.generation import Rollout
from posttrain.rollout.source import Learning
from posttrain.trainers.config import accepts_old_spellings
from posttrain.trainers.online import OnlineTrainer
from posttrain.trainers.online_config import OnlineConfig


@accepts_old_spellings
@dataclass
class RLOOConfig(OnlineConfig):
    """Settings of REINFORCE leave-one-out. Raises ConfigError for one that is not honoured, naming it."""

    MAKES_ROUNDS: ClassVar[tuple[str, ...]] = (*OnlineConfig.MAKES_ROUNDS, "normalize_advantages", "reward_clip_range")
    LEAST_GENERATIONS_EVAL: ClassVar[int] = 2

    num_generations: int | None = field(default=2, metadata={"help": "Completions of each prompt, which are compared."})
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL divergence that rewards are reduced by."})
    normalize_advantages: bool = field(
        default=False, metadata={"help": "Bring a round's advantages to mean 0 and deviation 1."}
    )
    reward_clip_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "Least and greatest reward; what lies beyond is brought there."}
    )

    def _check_choices(self) -> None:
        super()._check_choices()
        clip = self.reward_clip_range
        is_pair = isinstance(clip, list | tuple) and len(clip) == 2 and all(isinstance(x, int | float) for x in clip)
        if clip is not None and not (is_pair and clip[0] < clip[1]):
            raise ConfigError(f"reward_clip_range={clip!r} must be two numbers, the lower one first")
        self.objective()

    def objective(self) -> LeaveOneOutLoss:
        assert self.epsilon_high is not None
        return LeaveOneOutLoss(self.epsilon, self.epsilon_high, self.beta)


class RLOOTrainer(OnlineTrainer):
    """REINFORCE with the mean reward of a completion's siblings as its baseline. Arguments are `OnlineTrainer`'s."""

    CONFIG = RLOOConfig
    args: RLOOConfig

    @property
    def logps_first(self) -> bool:
        return bool(self.args.beta)

    def objective(self) -> LeaveOneOutLoss:
        return self.args.objective()

    def learning(self) -> Learning:
        return Learning(skips_truncated=self.args.mask_truncated_completions)

    def advantages(self, rewards_NF: np.ndarray, rollouts: Sequence[Rollout], group_size: int) -> Advantages:
        args = self.args
        reward_N = weighted_sum(rewards_NF, np.array(self.rewards.weights, dtype=np.float64))
        judged_N = reward_N if args.reward_clip_range is None else np.clip(reward_N, *args.reward_clip_range)
        metrics = {}
        if args.beta:
            kl_N = np.array([_divergence(one) for one in rollouts])
            judged_N = judged_N - args.beta * kl_N
            metrics["kl"] = (float(kl_N.sum()), sum(one.num_rows for one in rollouts))
        found = leave_one_out(judged_N, group_size, normalize=args.normalize_advantages)
        return replace(found, reward_N=reward_N, metrics=metrics)


def _divergence(one: Rollout) -> float:
    """log policy / reference of a completion: an estimate of the KL divergence without bias, that may be negative."""
    if one.old_logp_R is None or one.ref_logp_R is None:  # nothing of it is trained
        return 0.0
    return float((one.old_logp_R.astype(np.float64) - one.ref_logp_R).sum())
