"""LoRA (arXiv 2106.09685) through PEFT, with a lean path for the ordinary case.

PEFT builds, names, saves and loads every adapter. For the ordinary case - one active LoRA adapter without DoRA or
other variants on a frozen `nn.Linear` - its layer is specialised to `LeanLora`, which runs the same arithmetic as one
autograd function: the scale is folded into B, the update is added in place, the input is saved once in its own dtype
and not cast to fp32, and no gradient is made for frozen weights or for an input that needs none. Everything else (DoRA,
several adapters, disabled or merged adapters, GPT-2's Conv1D) runs PEFT's own forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable

from posttrain.errors import ConfigError
from posttrain.models.low_rank import add_gradient, add_update, factor_gradient, low_factors


def add_adapter(model: Any, peft_config: PeftConfig) -> PeftModel:
    """Wrap `model` with a new adapter. Raises ConfigError where there is one already or the config is not PEFT's."""
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            "the model has an adapter already and peft_config asks for another",
            hint="train the one it has (leave peft_config out) or merge it first (model.merge_and_unload())",
        )
    if peft_config.is_prompt_learning:
        raise ConfigError(f"{peft_config.peft_type} learns prompts, which is not supported; use LoRA")
    if not 0 <= getattr(peft_config, "lora_dropout", 0) < 1:
        raise ConfigError(f"peft_config: lora_dropout={peft_config.lora_dropout} must be at least 0 and below 1")
    _check_saved_modules(model, peft_config)
    with warnings.catch_warnings():  # PEFT asks transformers under a name that transformers deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        try:
            return get_peft_model(model, peft_config)
        except ValueError as error:  # PEFT's own words for a rank of 0, or targets that the model does not have
            raise ConfigError(f"peft_config: {error}", hint='target_modules="all-linear" fits every model') from None


def _check_saved_modules(model: Any, peft_config: PeftConfig) -> None:
    """PEFT passes over names that the model does not have."""
    names = [name for name, _ in model.named_modules()]
    for wanted in getattr(peft_config, "modules_to_save", None) or []:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise ConfigError(f"peft_config: modules_to_save names {wanted!r}, which the model does not have")


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that adapters added to the model's layers."""
    return {
        parameter
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name in (*module.adapter_layer_names, "lora_magnitude_vector")
        if isinstance(getattr(module, name, None), nn.Module)
        for parameter in getattr(module, name).parameters()
    }


def specialise(model: nn.Module) -> int:
    """Give every LoRA layer that qualifies the lean forward; how many did."""
    count = 0
    for module in model.modules():
        if type(module) is PeftLoraLinear:
            module.__class__ = LeanLora  # the same attributes and state; only `forward` differs
            count += 1
    return count


class LeanLora(PeftLoraLinear):
    """PEFT's LoRA layer with one autograd function for the ordinary case. `transposed`: models/laid_out.py."""

    transposed: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.ordinary_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return _LoraProduct.apply(x, *self.parts(name), self.transposed)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self.transposed = None  # of a weight that becomes another, in place and past autograd's count of versions
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        self.transposed = None
        super().unmerge()

    def parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float, float]:
        """W, b, A, B, the scale and the rate of dropout now."""
        dropout = self.lora_dropout[name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return base.weight, base.bias, a, b, self.scaling[name], rate

    def ordinary_adapter(self) -> str | None:
        """The one adapter to apply, if nothing about it is out of the ordinary."""
        if self._disable_adapters or self.merged_adapters or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        ordinary = (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and type(self.base_layer) is nn.Linear
            and not self.base_layer.weight.requires_grad
            and not (self.base_layer.bias is not None and self.base_layer.bias.requires_grad)
            and isinstance(self.lora_dropout[name], nn.Dropout | nn.Identity)
        )
        return name if ordinary else None


class _LoraProduct(torch.autograd.Function):
    """y = x W' + b + s drop(x) A' B', for frozen W and b. `x (..., in)`, `A (r, in)`, `B (out, r)`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropout: float,
        transposed: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low_a, low_b = low_factors(a, b, scale, x)
        keep = None
        dropped = flat
        if dropout:
            keep = torch.empty_like(flat).bernoulli_(1 - dropout).div_(1 - dropout)
            dropped = flat * keep
        out = torch.nn.functional.linear(flat, weight, bias)
        inner = add_update(out, dropped, low_a, low_b)
        ctx.scale, ctx.rank, ctx.learned, ctx.transposed = scale, len(a), a.dtype, transposed
        ctx.save_for_backward(dropped, inner, weight, low_a, low_b, keep)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0]
        dropped, inner, weight, low_a, low_b, keep = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x: Any = None
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = flat @ weight if ctx.transposed is None else ctx.transposed(flat)
        apart = grad_x is None or keep is not None  # dropout stands between the two products
        grad_inner = flat @ low_b if apart else add_gradient(grad_x, flat, low_a, low_b)
        if grad_x is not None:
            if keep is not None:
                grad_x += (grad_inner @ low_a) * keep
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[3]:
            grad_a = factor_gradient(grad_inner, dropped, ctx.rank).to(ctx.learned)
        if ctx.needs_input_grad[4]:
            grad_b = factor_gradient(inner, flat, ctx.rank).t().to(ctx.learned) * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None, None, None
