"""What a model family does differently, in one place, and the check that the packed layout is honoured.

Nobody else asks a model what it is. A family that needs nothing special needs no line here: `self_check` runs a few
tokens through the packed forward and through the model's own plain forward and compares, so that a model this file has
never heard of is either right or runs padded, and says so.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import ConfigError
from posttrain.models.decoding import Memory, Reading
from posttrain.models.head import HeadShape
from posttrain.types import Layout

# Logit multipliers by model type; Granite and MiniCPM3 divide, the others multiply.
LOGIT_SCALES = {
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
    "granite": lambda config: 1 / config.logits_scaling,
    "granitemoe": lambda config: 1 / config.logits_scaling,
    "hyperclovax": lambda config: config.logits_scaling,
    "falcon_h1": lambda config: config.lm_head_multiplier,
}


def head_shape(model: PreTrainedModel) -> HeadShape:
    """Scale and soft cap of the model's logits."""
    config = model.config.get_text_config()
    scale = LOGIT_SCALES[config.model_type](config) if config.model_type in LOGIT_SCALES else None
    return HeadShape(scale=1.0 if scale is None else float(scale), softcap=_final_softcap(config))


def _final_softcap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


def refuse_unsupported(model: PreTrainedModel, router_aux_loss_coef: float | None) -> None:
    """Say no, by name, to what would otherwise train wrongly without a word."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is an encoder-decoder; posttrain trains causal language models")
    has_router = hasattr(config, "output_router_logits")
    if router_aux_loss_coef and not has_router:
        raise ConfigError(f"router_aux_loss_coef={router_aux_loss_coef} but {type(model).__name__} has no router")
    default = getattr(config, "router_aux_loss_coef", 0.0)
    coefficient = default if router_aux_loss_coef is None else router_aux_loss_coef
    if has_router and coefficient:
        raise ConfigError(
            f"{type(model).__name__} is a mixture of experts with a load-balancing loss (coefficient {coefficient}), "
            "which posttrain does not compute yet",
            hint="train without it: router_aux_loss_coef=0.0",
        )


def adapt_to_packing(model: PreTrainedModel) -> None:
    """Teach segment boundaries to layers that keep state outside attention."""
    if model.config.get_text_config().model_type in ("lfm2", "lfm2_moe"):
        for layer in model.modules():
            short_conv = getattr(layer, "conv", None)
            if isinstance(short_conv, torch.nn.Module) and type(short_conv).__name__ in (
                "Lfm2ShortConv",
                "Lfm2MoeShortConv",
            ):
                layer.conv = PackedShortConv(short_conv)


class PackedShortConv(torch.nn.Module):
    """LFM2's gated short convolution, stopped at segment boundaries: the tap that looks j tokens back is zero for the
    first j tokens of a segment. It holds the original's own children under their own names, so parameters, state dict
    and adapters do not notice; without a layout the original runs."""

    conv: Any
    in_proj: Any
    out_proj: Any

    def __init__(self, original: Any):
        super().__init__()
        self.conv, self.in_proj, self.out_proj = original.conv, original.in_proj, original.out_proj
        self._original = (original,)  # in a tuple, so that its parameters are not registered twice
        self.train(original.training)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, layout: Layout | Memory | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if layout is None:
            original = self._original[0]
            original.conv, original.in_proj, original.out_proj = self.conv, self.in_proj, self.out_proj
            return original(hidden_states, *args, **kwargs)
        gate_in, gate_out, signal = self.in_proj(hidden_states).chunk(3, dim=-1)
        signal = gate_in * signal
        weight = self.conv.weight[:, 0]  # (D, taps); the last tap is the present token
        if isinstance(layout, Memory):
            mixed = torch.einsum("bqd,dq->bd", layout.signals(self, signal), weight)[None]
        else:
            if isinstance(layout, Reading) and layout.memory is not None:
                layout.memory.remember_signal(self, signal, weight.shape[1], layout)
            mixed = signal * weight[:, -1]
            for back in range(1, weight.shape[1]):
                mixed = mixed + _shifted(signal, back, layout) * weight[:, -1 - back]
        if self.conv.bias is not None:
            mixed = mixed + self.conv.bias
        return self.out_proj(gate_out * mixed)


def _shifted(signal_1TD: torch.Tensor, back: int, layout: Layout) -> torch.Tensor:
    """Each token's value `back` tokens earlier in its own segment (or, before that, in what it continues), zero
    where there is none."""
    if layout.is_shared:
        key = ("earlier", back)
        if key not in layout.made:
            layout.made[key] = _earlier(back, layout).to(signal_1TD.device)
        return torch.nn.functional.pad(signal_1TD, (0, 0, 0, 1))[:, layout.made[key]]
    shifted = torch.nn.functional.pad(signal_1TD, (0, 0, back, 0))[:, : signal_1TD.shape[1]]
    keep_T = torch.ones(signal_1TD.shape[1], dtype=signal_1TD.dtype)
    for start, length in zip(layout.starts, layout.lengths, strict=True):
        keep_T[start : start + min(back, length)] = 0
    return shifted * keep_T.to(signal_1TD.device, non_blocking=True)[None, :, None]


def _earlier(back: int, layout: Layout) -> torch.Tensor:
    """The index of the token `back` earlier; that of a zero behind the last where there is none."""
    index_T = torch.arange(layout.num_tokens) - back
    for own, before in layout.segments():
        first = index_T[own][:back]
        context = torch.cat([torch.arange(part.start, part.stop) for part in before] or [torch.arange(0)])
        nowhere = torch.full((back,), layout.num_tokens)
        first.copy_(torch.cat([nowhere, context])[len(context) :][: len(first)])
    return index_T


NOISE = re.compile(r"(dropout(_p)?|pdrop|jitter_(noise|eps))$")
"""Of numbers that are rates of it."""


def drops(module: nn.Module) -> bool:
    """Whether this module, without those in it, drops something at random when it trains, or shakes it: in a dropout
    layer, weights of attention, what comes out (StarCoder 2), a router's input (Mixtral)."""
    rates = [rate for name, rate in vars(module).items() if NOISE.search(name)]
    if isinstance(module, nn.Dropout):
        rates.append(module.p)
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def learned_places(model: nn.Module) -> int | None:
    """For how many tokens in a row the model has learned positions (GPT-2, OPT); None where they are computed."""
    named = ("wpe", "embed_positions", "position_embeddings")
    tables = [one for name, one in model.named_modules() if name.endswith(named) and isinstance(one, nn.Embedding)
              and not re.search(r"audio|vision|visual|image", name)]  # fmt: skip
    return min((table.num_embeddings - _before_the_first(table) for table in tables), default=None)


def _before_the_first(table: nn.Embedding) -> int:
    """Places that no token has: OPT's offset, and those up to RoBERTa's for padding."""
    return int(getattr(table, "offset", 0)) or (0 if table.padding_idx is None else table.padding_idx + 1)
