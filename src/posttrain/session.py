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
from posttrain.models.fused_attention import specialise_attention
from posttrain.models.laid_out import laid_out_bytes, lay_out, take_back
from posttrain.models.lean_layers import give_back, specialise_layers
from posttrain.models.memory import keep_freed_pages
from posttrain.models.precision import MixedPrecision
from posttrain.models.recomputation import LEVELS, recompute_layers
from posttrain.models.scoring import Scorer, is_classifier


@dataclass
class Session:
    """`trained` maps names to what the optimiser holds: fp32 masters and adapter parameters, those of a value model as
    `value_model.<name>`."""

    policy: Policy
    precision: MixedPrecision
    trained: dict[str, torch.nn.Parameter]
    attention: list[str | None]
    lean: list[torch.nn.Module]
    args: TrainingArguments
    recomputation: str = "none"
    checkpoint_options: dict[str, Any] | None = None

    @classmethod
    def open(cls, model: Any, args: TrainingArguments, value_model: Any = None) -> Session:
        """`value_model`, a model with one score, is opened and trained with it. Raises ConfigError where a model cannot
        be trained faithfully."""
        keep_freed_pages()
        both = Together(model, value_model)
        both.to(args.device)
        adapter_parameters = set[torch.nn.Parameter]()
        for one in both.models():
            adapters.specialise(one)
            adapter_parameters |= adapters.adapter_parameters(one)
        precision = MixedPrecision(both, torch.bfloat16 if args.bf16 else torch.float32, adapter_parameters)
        bases = [_base(one) for one in both.models()]
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
                for one, base in zip(both.models(), bases, strict=True)
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
        for other in others:
            policy.value_model = other
            policy.shares_prompts = policy.shares_prompts and other.shares_prompts
        trained = dict(precision.masters())
        trained |= {n: p for n, p in both.named_parameters() if p in adapter_parameters and p.requires_grad}
        trained = {name.removeprefix("policy."): parameter for name, parameter in trained.items()}
        options = args.activation_checkpointing_kwargs
        session = cls(policy, precision, trained, attention, lean, args, checkpoint_options=options)
        session.recompute(_asked(args))
        return session

    @property
    def trained_of_policy(self) -> dict[str, torch.nn.Parameter]:
        """Without what says values."""
        return {name: one for name, one in self.trained.items() if not name.startswith(("value_head.", "value_model."))}

    def attach(self, value_head: torch.nn.Linear) -> None:
        """Let the policy say values too; the head is trained beside the model, in its own precision."""
        self.policy.value_head = value_head.to(self.policy.device)
        self.trained |= {f"value_head.{name}": parameter for name, parameter in value_head.named_parameters()}

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
        """The policy, and the value model where there is one."""
        return [self.policy, *([self.policy.value_model] if self.policy.value_model is not None else [])]

    def recompute_more(self) -> bool:
        """One level up. False where there is none, or the model has no layers that can be made again."""
        above = LEVELS[LEVELS.index(self.recomputation) + 1 :]
        can = all(policy.base.supports_gradient_checkpointing for policy in self.policies())
        if not above or (above[0] == "full" and not can):
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


class Together(torch.nn.Module):
    """A policy and the value model that is trained beside it, as one module."""

    def __init__(self, policy: torch.nn.Module, value_model: torch.nn.Module | None):
        super().__init__()
        self.policy, self.value_model = policy, value_model

    def models(self) -> list[torch.nn.Module]:
        return [self.policy, *([] if self.value_model is None else [self.value_model])]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _asked(args: TrainingArguments) -> str:
    """The level to begin with; where it is left to us, the planner may choose a higher one."""
    if args.activation_checkpointing:
        return "full"
    level = getattr(args, "recompute", "auto")
    return "none" if level == "auto" else level
