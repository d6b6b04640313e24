"""`DPOConfig`: TRL 1.16's settings of direct preference optimisation, and a few of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.objectives.dpo import F_DIVERGENCES, LOSSES, PreferenceLoss, Settings
from posttrain.trainers.answers import ReferenceConfig
from posttrain.trainers.config import PackedConfig, accepts_old_spellings


@accepts_old_spellings
@dataclass
class DPOConfig(ReferenceConfig):
    """Settings of preference optimisation. Raises ConfigError for one that is not honoured, naming it."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "f_divergence_type": tuple(F_DIVERGENCES),
        **PackedConfig.CHOICES,
    }
    ONLY_WITH: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **ReferenceConfig.ONLY_WITH,
        "discopop_tau": ("loss_type", ("discopop",)),
        "simpo_gamma": ("loss_type", ("simpo",)),
        "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
    }

    beta: Any = field(
        default=0.1,
        metadata={
            "help": "How far the policy may leave the reference: less with a larger one. A list has one for each "
            "epoch; the last stays."
        },
    )
    loss_type: Any = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": f"One or several of: {', '.join(LOSSES)}."}
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several loss types (MPO). Default: 1 each."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels taken to be flipped (robust, AOT, SimPO, CPO); EXO's epsilon."}
    )
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight of tokens beyond the shorter answer's length, 0 to 1."}
    )
    f_divergence_type: str = field(default="reverse_kl", metadata={"help": "Divergence from the reference."})
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Alpha of the alpha divergence."})
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weigh each pair by how likely the policy finds it."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of DiscoPOP's blend."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO's margin gamma."})

    def _read_spellings(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if (
            not isinstance(self.loss_type, list | tuple)
            or not self.loss_type
            or not all(isinstance(name, str) for name in self.loss_type)
        ):
            raise ConfigError(f"loss_type={self.loss_type!r} is neither a name nor a list of them")
        self.loss_type = list(self.loss_type)
        if self.loss_weights is not None and (not isinstance(self.loss_weights, list | tuple) or not self.loss_weights):
            raise ConfigError(f"loss_weights={self.loss_weights!r} is no list of numbers, one for each loss type")

    @property
    def has_schedule(self) -> bool:
        return isinstance(self.beta, list | tuple)

    def beta_at(self, epoch: float) -> float:
        """Raises ConfigError for what is no number, and no list of them."""
        betas = list(self.beta) if self.has_schedule else [self.beta]
        if not betas or any(isinstance(beta, bool) or not isinstance(beta, int | float) for beta in betas):
            raise ConfigError(f"beta={self.beta!r} is neither a number nor a list of them, one for each epoch")
        if not all(0 < beta < math.inf for beta in betas):
            raise ConfigError(f"beta={self.beta!r} must be above 0", hint="0.1 is usual, 0.01 to 0.5 are tried")
        return float(betas[min(int(epoch + 1e-6), len(betas) - 1)])

    def objective(self, epoch: float = 0.0) -> PreferenceLoss:
        """As it is in `epoch`. Raises ConfigError for settings that contradict each other."""
        return PreferenceLoss(
            losses=tuple(self.loss_type),
            weights=tuple(self.loss_weights or [1.0] * len(self.loss_type)),
            settings=Settings(
                beta=self.beta_at(epoch),
                label_smoothing=self.label_smoothing,
                discopop_tau=self.discopop_tau,
                simpo_gamma=self.simpo_gamma,
                f_divergence=self.f_divergence_type,
                f_alpha=self.f_alpha_divergence_coef,
            ),
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
        )
