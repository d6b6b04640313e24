"""`GRPOConfig`: TRL 1.16's settings of group-relative policy optimisation, and a few of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.objectives.correction import MODES, Correction
from posttrain.objectives.policy import LOSSES, PolicyLoss, Settings
from posttrain.rollout.advantages import AGGREGATIONS, SCALES
from posttrain.rollout.entropy_control import EntropyControl
from posttrain.trainers.config import accepts_old_spellings
from posttrain.trainers.online_config import OnlineConfig
from posttrain.trainers.spellings import Rewrite, renamed

OF_ADAPTIVE = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")


@accepts_old_spellings
@dataclass
class GRPOConfig(OnlineConfig):
    """Settings of GRPO and its variants. Raises ConfigError for one that is not honoured, naming it."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        **OnlineConfig.CHOICES,
        "loss_type": tuple(LOSSES),
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": SCALES,
        "multi_objective_aggregation": AGGREGATIONS,
        "dynamic_sampling": ("none", "skip", "replace"),
    }
    SPELLINGS: ClassVar[dict[str, Rewrite]] = {
        **OnlineConfig.SPELLINGS,
        "vllm_importance_sampling_cap": renamed("vllm_importance_sampling_clip_max"),
    }
    MAKES_ROUNDS: ClassVar[tuple[str, ...]] = (
        *OnlineConfig.MAKES_ROUNDS, "scale_rewards", "multi_objective_aggregation", "dynamic_sampling",
        "max_resampling_rounds",
    )  # fmt: skip
    NOT_HONOURED: ClassVar[tuple[str, ...]] = (
        *OnlineConfig.NOT_HONOURED, "cast_lm_head_to_fp32", "max_tool_calling_iterations",
    )  # fmt: skip

    loss_type: str = field(default="dapo", metadata={"help": f"One of: {', '.join(LOSSES)}."})
    importance_sampling_level: str = field(
        default="token", metadata={"help": "Ratios of tokens, or of whole sequences (GSPO)."}
    )
    scale_rewards: Any = field(
        default="group", metadata={"help": "Divide advantages by the standard deviation of the group, batch, or none."}
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "Sum rewards, then normalise them; or the other way (GDPO)."}
    )
    delta: float | None = field(default=None, metadata={"help": "Upper bound of the unclipped side (two-sided GRPO)."})
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "SAPO: of bad completions."})
    sapo_temperature_pos: float = field(default=1.0, metadata={"help": "SAPO: of good completions."})
    vespo_k_pos: float = field(default=2.0, metadata={"help": "VESPO: power for good completions."})
    vespo_lambda_pos: float = field(default=3.0, metadata={"help": "VESPO: decay for good completions."})
    vespo_k_neg: float = field(default=3.0, metadata={"help": "VESPO: power for bad completions."})
    vespo_lambda_neg: float = field(default=2.0, metadata={"help": "VESPO: decay for bad completions."})
    top_entropy_quantile: float = field(
        default=1.0, metadata={"help": "Learn from this share of a batch's tokens, the most uncertain ones."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of a bonus for uncertainty."})
    use_adaptive_entropy: bool = field(
        default=False,
        metadata={"help": "Let entropy_coef grow while entropy is at most entropy_target, and shrink above it."},
    )
    entropy_coef_min: float = field(default=0.0, metadata={"help": "Of use_adaptive_entropy: least coefficient."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "Of use_adaptive_entropy: greatest coefficient."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "Of use_adaptive_entropy: change in a step."})
    entropy_target: float = field(
        default=0.2, metadata={"help": "Of use_adaptive_entropy: mean entropy of a token, in nats; no bonus above it."}
    )
    off_policy_mask_threshold: float | None = field(
        default=None, metadata={"help": "Leave out bad completions that the policy has left behind by more."}
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Weigh the KL divergence by the ratio, so that its gradient is unbiased."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "With use_vllm: weigh tokens by how likely the policy finds what was sampled."}
    )
    vllm_importance_sampling_mode: str = field(default="sequence_mask", metadata={"help": f"How: {', '.join(MODES)}."})
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata={"help": "Greatest ratio."})
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata={"help": "Least ratio."})
    cast_lm_head_to_fp32: bool = field(default=False, metadata={"help": "Not needed."})
    max_tool_calling_iterations: int | None = field(default=None, metadata={"help": "Not honoured yet."})
    dynamic_sampling: str = field(
        default="none",
        metadata={"help": "DAPO: groups whose rewards do not differ count in the mean ('none'), are left out of it "
                  "('skip'), or are replaced by groups of other prompts ('replace')."},
    )  # fmt: skip
    max_resampling_rounds: int = field(
        default=3, metadata={"help": "With dynamic_sampling='replace': how often groups are replaced before giving up."}
    )

    def _read_spellings(self) -> None:
        super()._read_spellings()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"

    def _check_choices(self) -> None:
        super()._check_choices()
        if self.max_resampling_rounds < 1:
            raise ConfigError(f"max_resampling_rounds={self.max_resampling_rounds} must be at least 1")
        for name in (name for name in OF_ADAPTIVE if not self.use_adaptive_entropy):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={getattr(self, name)} is heeded with use_adaptive_entropy=True only")
        self.entropy_control()
        self.objective()

    def correction(self) -> Correction | None:
        """Only another engine than our own needs one."""
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return None
        return Correction(self.vllm_importance_sampling_mode, self.vllm_importance_sampling_clip_min,
                          self.vllm_importance_sampling_clip_max)  # fmt: skip

    def entropy_control(self) -> EntropyControl | None:
        if not self.use_adaptive_entropy:
            return None
        return EntropyControl(self.entropy_coef, self.entropy_coef_min, self.entropy_coef_max, self.entropy_coef_delta,
                              self.entropy_target)  # fmt: skip

    def objective(self) -> PolicyLoss:
        """Raises ConfigError for settings that contradict each other."""
        assert self.epsilon_high is not None
        assert self.max_completion_length is not None
        return PolicyLoss(
            loss_type=self.loss_type,
            level=self.importance_sampling_level,
            beta=self.beta,
            settings=Settings(
                epsilon=self.epsilon,
                epsilon_high=self.epsilon_high,
                delta=self.delta,
                sapo_temperature_neg=self.sapo_temperature_neg,
                sapo_temperature_pos=self.sapo_temperature_pos,
                vespo_k_pos=self.vespo_k_pos,
                vespo_lambda_pos=self.vespo_lambda_pos,
                vespo_k_neg=self.vespo_k_neg,
                vespo_lambda_neg=self.vespo_lambda_neg,
            ),
            max_completion_length=self.max_completion_length,
            corrected_kl=self.use_bias_correction_kl,
            top_entropy=self.top_entropy_quantile,
            entropy_coef=self.entropy_coef,
            adaptive_entropy=self.use_adaptive_entropy,
            off_policy_threshold=self.off_policy_mask_threshold,
            correction=self.correction(),
        )
