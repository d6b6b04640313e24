"""`DPOConfig`: TRL 1.16's settings of direct preference optimisation, and a few of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.objectives.dpo import F_DIVERGENCES, LOSSES, PreferenceLoss, Settings
from posttrain.trainers.config import PackedConfig, accepts_old_spellings


@accepts_old_spellings
@dataclass
class DPOConfig(PackedConfig):
    """Settings of preference optimisation. Raises ConfigError for one that is not honoured, naming it."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "f_divergence_type": tuple(F_DIVERGENCES),
        **PackedConfig.CHOICES,
    }

    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate; 10 to 100 times below what supervised training takes."}
    )
    loss_type: Any = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": f"One or several of: {', '.join(LOSSES)}."}
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several loss types (MPO). Default: 1 each."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "How far the policy may leave the reference: less with a larger one. IPO's tau."}
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
    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO's margin, over beta (its authors' gamma/beta)."})
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off in the model and its adapters."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens: its beginning is cut off. Default: no limit."}
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
    sync_ref_model: bool = field(default=False, metadata={"help": "Not supported yet: the reference stays."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "Of sync_ref_model."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Of sync_ref_model."})

    def _read_spellings(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if not isinstance(self.loss_type, list | tuple) or not self.loss_type:
            raise ConfigError(f"loss_type={self.loss_type!r} is neither a name nor a list of them")

    def _check_choices(self) -> None:
        super()._check_choices()
        if self.sync_ref_model:
            help_text = type(self).__dataclass_fields__["sync_ref_model"].metadata["help"]
            raise ConfigError(f"sync_ref_model=True is not honoured: {help_text}")
        self.objective()

    def objective(self) -> PreferenceLoss:
        """Raises ConfigError for settings that contradict each other."""
        return PreferenceLoss(
            losses=tuple(self.loss_type),
            weights=tuple(self.loss_weights or [1.0] * len(self.loss_type)),
            settings=Settings(
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                discopop_tau=self.discopop_tau,
                simpo_gamma=self.simpo_gamma,
                f_divergence=self.f_divergence_type,
                f_alpha=self.f_alpha_divergence_coef,
            ),
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
        )
