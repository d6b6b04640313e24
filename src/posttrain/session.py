"""A model opened for packed computing, and given back as it was found.

Opening casts it to the compute dtype with fp32 masters, switches attention and LoRA layers to ours, proves on a few
tokens that the layout is honoured, and turns on recomputation where it was asked for. Closing undoes all of it; what
was trained stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainingArguments

from posttrain.models import adapters
from posttrain.models.forward import Policy, open_policy
from posttrain.models.lean_layers import give_back, specialise_layers
from posttrain.models.memory import keep_freed_pages
from posttrain.models.precision import MixedPrecision
from posttrain.models.recomputation import LEVELS, recompute_layers
from posttrain.models.scoring import Scorer, is_classifier


@dataclass
class Session:
    """`trained` maps names to what the optimiser holds: fp32 masters and adapter parameters."""

    policy: Policy
    precision: MixedPrecision
    trained: dict[str, torch.nn.Parameter]
    attention: str | None
    lean: list[torch.nn.Module]
    args: TrainingArguments
    recomputation: str = "none"
    checkpoint_options: dict[str, Any] | None = None

    @classmethod
    def open(cls, model: Any, args: TrainingArguments) -> Session:
        """Raises ConfigError where the model cannot be trained faithfully."""
        keep_freed_pages()
        model.to(args.device)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        adapters.specialise(model)
        adapter_parameters = adapters.adapter_parameters(model)
        precision = MixedPrecision(model, torch.bfloat16 if args.bf16 else torch.float32, adapter_parameters)
        attention = base.config._attn_implementation
        lean = specialise_layers(base)
        try:
            policy = open_policy(
                model,
                kind=Scorer if is_classifier(base) else Policy,
                neftune_alpha=args.neftune_noise_alpha,
                router_aux_loss_coef=getattr(args, "router_aux_loss_coef", None),
            )
        except BaseException:
            give_back(lean)
            precision.restore()
            raise
        policy.shape = replace(policy.shape, temperature=getattr(args, "temperature", 1.0))
        trained = dict(precision.masters())
        trained |= {n: p for n, p in model.named_parameters() if p in adapter_parameters and p.requires_grad}
        options = args.activation_checkpointing_kwargs
        session = cls(policy, precision, trained, attention, lean, args, checkpoint_options=options)
        session.recompute(_asked(args))
        return session

    def attach(self, value_head: torch.nn.Linear) -> None:
        """Let the policy say values too; the head is trained beside the model, in its own precision."""
        self.policy.value_head = value_head.to(self.policy.device)
        self.trained |= {f"value_head.{name}": parameter for name, parameter in value_head.named_parameters()}

    def recompute(self, level: str) -> None:
        """From the next forward on, make again what `level` says (models/recomputation.py)."""
        base = self.policy.base
        if "full" in (level, self.recomputation) and level != self.recomputation:
            if level == "full":
                recompute_layers(base, self.checkpoint_options)
            else:
                base.activation_checkpointing_disable()
        self.policy.recomputes_cheap_parts = level == "selective"
        self.recomputation = level

    def recompute_more(self) -> bool:
        """One level up. False where there is none, or the model has no layers that can be made again."""
        above = LEVELS[LEVELS.index(self.recomputation) + 1 :]
        if not above or (above[0] == "full" and not self.policy.base.supports_gradient_checkpointing):
            return False
        self.recompute(above[0])
        return True

    def close(self) -> None:
        base = self.policy.base
        self.recompute("none")
        give_back(self.lean)
        self.precision.restore()
        base.set_attn_implementation(self.attention)


def _asked(args: TrainingArguments) -> str:
    """The level to begin with; where it is left to us, the planner may choose a higher one."""
    if args.activation_checkpointing:
        return "full"
    level = getattr(args, "recompute", "auto")
    return "none" if level == "auto" else level
