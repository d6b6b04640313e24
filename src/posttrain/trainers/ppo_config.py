"""Settings of PPO: those of the last TRL versions that had it (0.12 to 0.23), adaptive KL control (`adap_kl_ctrl`,
`target`, `horizon`) of the versions before, and a few of ours.

A round has `per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches` completions, which
`num_ppo_epochs` passes are made over; a pass takes `num_mini_batches` steps of the optimiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.objectives.ppo import PPOLoss
from posttrain.rollout.credit import Credit
from posttrain.rollout.kl_control import KLControl
from posttrain.trainers.config import accepts_old_spellings
from posttrain.trainers.online_config import OnlineConfig
from posttrain.trainers.spellings import Rewrite, refused, renamed

BATCHES = "set per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches, whose product is a round"
OTHER_PENALTY = "the KL divergence is estimated by kl_estimator, 'k1' or 'k3'"
NOT_BUILT = "PPO here has no such thing; max_grad_norm, cliprange and adap_kl_ctrl bound an update"


@accepts_old_spellings
@dataclass
class PPOConfig(OnlineConfig):
    """Settings of proximal policy optimisation. Raises ConfigError for one that is not honoured, naming it."""

    SPELLINGS: ClassVar[dict[str, Rewrite]] = {
        **OnlineConfig.SPELLINGS,
        "beta": renamed("kl_coef"),
        "init_kl_coef": renamed("kl_coef"),
        "epsilon": renamed("cliprange"),
        "ppo_epochs": renamed("num_ppo_epochs"),
        "num_iterations": renamed("num_ppo_epochs"),
        "max_completion_length": renamed("response_length"),
        **{name: refused(name, BATCHES) for name in (
            "batch_size", "mini_batch_size", "local_batch_size", "local_mini_batch_size", "micro_batch_size",
            "num_total_batches", "generation_batch_size", "steps_per_generation", "forward_batch_size",
        )},
        "epsilon_high": refused("epsilon_high", "the clip is as wide on both sides; set cliprange"),
        "kl_penalty": refused("kl_penalty", OTHER_PENALTY),
        "stop_token_id": refused("stop_token_id", "set generation_kwargs={'stop': [...]} to the text that ends it"),
        "model_adapter_name": refused("model_adapter_name", "call model.set_adapter(...) first"),
        "early_stopping": refused("early_stopping", NOT_BUILT),
        "target_kl": refused("target_kl", NOT_BUILT),
        "ratio_threshold": refused("ratio_threshold", NOT_BUILT),
        "use_score_scaling": refused("use_score_scaling", "set whiten_rewards, or scale them with reward_weights"),
        "use_score_norm": refused("use_score_norm", "set whiten_rewards"),
        "score_clip": refused("score_clip", "clip in a reward function of your own"),
    }  # fmt: skip
    MAKES_ROUNDS: ClassVar[tuple[str, ...]] = (
        *OnlineConfig.MAKES_ROUNDS, "kl_estimator", "whiten_rewards", "gamma", "lam", "missing_eos_penalty",
        "adap_kl_ctrl", "target", "horizon",
    )  # fmt: skip
    KL_WEIGHT: ClassVar[str] = "kl_coef"
    LEAST_GENERATIONS: ClassVar[int] = 1

    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off in the model and its adapters."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions of each prompt in a round."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampling, and of the log-probabilities trained on."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "How often each completion is learned from."})
    num_mini_batches: int = field(default=1, metadata={"help": "Steps of the optimiser in a pass over a round."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Completions to sample in all, instead of num_train_epochs or max_steps."}
    )
    response_length: int = field(default=53, metadata={"help": "Most tokens of a completion."})
    stop_token: str | None = field(
        default=None, metadata={"help": "'eos' or None: completions end with the end-of-sequence token either way."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that was cut off."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL divergence that rewards are reduced by."})
    kl_estimator: str = field(default="k1", metadata={"help": "'k1' (the log-ratio) or 'k3' (never negative)."})
    adap_kl_ctrl: bool = field(
        default=False, metadata={"help": "Adapt kl_coef after each round, so that the divergence stays near target."}
    )
    target: float = field(default=6.0, metadata={"help": "With adap_kl_ctrl: KL divergence of a completion, in nats."})
    horizon: float = field(
        default=10_000.0, metadata={"help": "With adap_kl_ctrl: completions over which it is corrected."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Bring a round's rewards to deviation 1."})
    cliprange: float = field(default=0.2, metadata={"help": "How far a ratio may leave 1 before it is clipped."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "How far a value may leave what it was when sampled before it is clipped."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value function's loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Name or folder of the reward model, where reward_model is not given."}
    )
    sft_model_path: str | None = field(
        default=None, metadata={"help": "Name or folder of the model, where model is not given."}
    )
    value_model_path: str | None = field(
        default=None, metadata={"help": "Name or folder of a value model. Default: a head on the policy's layers."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "An adapter of the model to be the reference."}
    )
    reward_validation: str | None = field(
        default=None, metadata={"help": "The reward model's validation record, where it does not lie in its folder."}
    )
    reward_validation_accuracy: float = field(
        default=0.6, metadata={"help": "Least accuracy on held-out pairs that a reward model is trusted with."}
    )
    reward_validation_pairs: int = field(default=50, metadata={"help": "Least number of held-out pairs that say so."})
    exp_name: str | None = field(default=None, metadata={"help": "Accepted; run_name names a run."})
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Accepted; batches hold token_budget tokens."}
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "Accepted; every completion is in samples.jsonl."}
    )

    # What the others call the same, made of the above.
    beta: float = field(init=False, default=0.05)
    epsilon: float = field(init=False, default=0.2)
    epsilon_high: float | None = field(init=False, default=None)
    num_iterations: int = field(init=False, default=4)
    max_completion_length: int | None = field(init=False, default=53)
    generation_batch_size: int | None = field(init=False, default=None)
    steps_per_generation: int | None = field(init=False, default=None)

    def _read_spellings(self) -> None:
        self._check_own()
        self.beta, self.epsilon, self.num_iterations = self.kl_coef, self.cliprange, self.num_ppo_epochs
        self.epsilon_high, self.generation_batch_size = None, None
        self.max_completion_length = self.response_length
        self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        super()._read_spellings()
        a_round = self.per_device_train_batch_size * self.steps_per_generation
        if (control := self.control()) is not None:
            control.check_fits(a_round)
        if self.total_episodes is not None:
            steps = math.ceil(self.total_episodes / a_round) * self.num_ppo_epochs * self.num_mini_batches
            if self.max_steps not in (-1, steps):
                raise ConfigError(f"total_episodes={self.total_episodes} makes {steps} steps, and max_steps="
                                  f"{self.max_steps} contradicts it", hint="give one of them")  # fmt: skip
            self.max_steps: int = steps

    def _check_own(self) -> None:
        """Under the names that people know them by."""
        for name in ("num_ppo_epochs", "num_mini_batches", "response_length", "reward_validation_pairs"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be at least 1")
        if self.total_episodes is not None and self.total_episodes < 1:
            raise ConfigError(f"total_episodes={self.total_episodes} must be at least 1")
        if self.stop_token not in (None, "eos"):
            raise ConfigError(f"stop_token={self.stop_token!r} is not honoured: a completion ends with the "
                              "end-of-sequence token", hint="set generation_kwargs={'stop': [...]}")  # fmt: skip
        if self.kl_coef < 0:
            raise ConfigError(f"kl_coef={self.kl_coef} must be at least 0")
        if not self.kl_coef and not (self.no_kl_reason or "").strip():
            raise ConfigError("kl_coef=0: nothing holds the policy to where it started, and it will find what is wrong "
                              "with the reward", hint="set kl_coef (0.05 is usual), or say why not: "
                              "no_kl_reason='...'")  # fmt: skip
        if not 0 <= self.reward_validation_accuracy <= 1:
            raise ConfigError(f"reward_validation_accuracy={self.reward_validation_accuracy} must be from 0 to 1")
        if self.missing_eos_penalty is not None and self.mask_truncated_completions:
            raise ConfigError("missing_eos_penalty teaches from completions that were cut off, and "
                              "mask_truncated_completions=True leaves them out", hint="give one of them")  # fmt: skip
        self.credit()
        self.control()
        PPOLoss(self.cliprange, self.cliprange_value, self.vf_coef, self.kl_coef)

    def objective(self) -> PPOLoss:
        return PPOLoss(self.cliprange, self.cliprange_value, self.vf_coef, self.kl_coef)

    def credit(self) -> Credit:
        return Credit(self.kl_estimator, self.gamma, self.lam, self.whiten_rewards, self.missing_eos_penalty or 0.0)

    def control(self) -> KLControl | None:
        return KLControl(self.kl_coef, self.target, self.horizon) if self.adap_kl_ctrl else None
