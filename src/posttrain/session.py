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
from posttrain.models.critic import Critic
from posttrain.models.forward import Policy, open_policy
from posttrain.models.fused_attention import specialise_attention
from posttrain.models.laid_out import laid_out_bytes, lay_out, take_back
from posttrain.models.lean_layers import give_back, specialise_layers
from posttrain.models.precision import MixedPrecision
from posttrain.models.recomputation import LEVELS, recompute_layers
from posttrain.models.scoring import Scorer, is_classifier


@dataclass
class Session:
    """`trained` maps names to what the optimiser holds: fp32 masters and adapter parameters, and what is trained of a
    critic, whose name stands before its own."""

    policy: Policy
    precision: MixedPrecision
    trained: dict[str, torch.nn.Parameter]
    attention: list[str | None]
    lean: list[torch.nn.Module]
    args: TrainingArguments
    recomputation: str = "none"
    checkpoint_options: dict[str, Any] | None = None

    @classmethod
    def open(cls, model: Any, args: TrainingArguments, critic: Critic | None = None) -> Session:
        """`critic` is opened and trained with it. Raises ConfigError where a model cannot be trained faithfully."""
        together = torch.nn.ModuleDict({"policy": model, **({} if critic is None else critic.models)})
        together.to(args.device)
        adapter_parameters = set[torch.nn.Parameter]()
        for one in together.values():
            adapters.specialise(one)
            adapter_parameters |= adapters.adapter_parameters(one)
        precision = MixedPrecision(together, torch.bfloat16 if args.bf16 else torch.float32, adapter_parameters)
        bases = [_base(one) for one in together.values()]
        attention = [base.config._attn_implementation for base in bases]
        lean = [layer for base in bases for layer in specialise_layers(base)]
        try:
            policy, *others = [
                open_policy(
                    one,
                    kind=Scorer if is_classifier(base) else Policy,
                    neftune_alpha=args.neftune_noise_alpha,
                    router_aux_loss_coef=getattr(args, "router_aux_loss_coef", None),
                )
                for one, base in zip(together.values(), bases, strict=True)
            ]
        except BaseException:
            give_back(lean)
            precision.restore()
            for base, before in zip(bases, attention, strict=True):
                base.set_attn_implementation(before)
            raise
        lean += [layer for base, one in zip(bases, [policy, *others], strict=True) if one.is_packed
                 for layer in specialise_attention(base)]  # fmt: skip
        policy.shape = replace(policy.shape, temperature=getattr(args, "temperature", 1.0))
        policy.shares_prompts = all(one.shares_prompts for one in (policy, *others))
        trained = dict(precision.masters())
        trained |= {n: p for n, p in together.named_parameters() if p in adapter_parameters and p.requires_grad}
        trained = {name.removeprefix("policy."): parameter for name, parameter in trained.items()}
        if critic is not None:
            critic.open(others, policy.device)
            policy.critic = critic
            trained |= critic.own_parameters()
        options = args.activation_checkpointing_kwargs
        session = cls(policy, precision, trained, attention, lean, args, checkpoint_options=options)
        session.recompute(_asked(args))
        return session

    @property
    def trained_of_policy(self) -> dict[str, torch.nn.Parameter]:
        """Without the critic's."""
        critic = self.policy.critic
        if critic is None:
            return self.trained
        return {name: one for name, one in self.trained.items() if not name.startswith(f"{critic.name}.")}

    def recompute(self, level: str) -> None:
        """From the next forward on, make again what `level` says (models/recomputation.py)."""
        for policy in self.policies():
            if "full" in (level, self.recomputation) and level != self.recomputation:
                if level == "full":
                    recompute_layers(policy.base, self.checkpoint_options)
                else:
                    policy.base.activation_checkpointing_disable()
            policy.recomputes_cheap_parts = level == "selective"
        self.recomputation = level

    def policies(self) -> list[Policy]:
        """The policy, and the critic's model where it has one."""
        return [self.policy, *([] if self.policy.critic is None else self.policy.critic.policies)]

    @property
    def can_recompute_layers(self) -> bool:
        """Whether every model that is open has layers that can be made again."""
        return all(policy.base.supports_gradient_checkpointing for policy in self.policies())

    def recompute_more(self) -> bool:
        """One level up. False where there is none, or it is not to be had."""
        above = LEVELS[LEVELS.index(self.recomputation) + 1 :]
        if not above or (above[0] == "full" and not self.can_recompute_layers):
            return False
        self.recompute(above[0])
        return True

    @property
    def laid_out_bytes(self) -> int:
        """What `lay_out` would take."""
        return sum(laid_out_bytes(policy.base) for policy in self.policies())

    def lay_out(self) -> None:
        """Spend memory on quicker products (models/laid_out.py)."""
        for policy in self.policies():
            lay_out(policy.base)

    def close(self) -> None:
        for policy in self.policies():
            take_back(policy.base)
        self.recompute("none")
        give_back(self.lean)
        self.precision.restore()
        for policy, attention in zip(self.policies(), self.attention, strict=True):
            policy.base.set_attn_implementation(attention)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _asked(args: TrainingArguments) -> str:
    """The level to begin with; where it is left to us, the planner may choose a higher one."""
    if args.activation_checkpointing:
        return "full"
    level = getattr(args, "recompute", "auto")
    return "none" if level == "auto" else level
