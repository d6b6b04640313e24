"""A policy's weights as lean decoding wants them (models/lean_decoding.py): projections with the same input joined, and
on a CPU laid out for the native kernels or, in bf16, for oneDNN; what is frozen once and for all, what is trained after
each update.

Shape suffixes: `B` rows, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posttrain import native
from posttrain.models.adapters import LeanLora
from posttrain.models.available import total_memory
from posttrain.models.forward import Policy
from posttrain.models.fused_attention import has_caps, window_of
from posttrain.native.kernels import per_word
from posttrain.native.strips import Strips

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
OF_TRAINED = 16
"""Bytes of a parameter that learns: master, gradient and Adam's two moments in fp32."""


class Product:
    """`y = x W' + b` of several layers with the same input, with their adapters' `s A' B'`. In one of three layouts:
    strips for the native kernels, packed for oneDNN, or as torch has it."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        bases = [_base(layer) for layer in layers]
        self.is_frozen = not any(parameter.requires_grad for base in bases for parameter in base.parameters())
        self.strips: Strips | None = None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.is_packed = False
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None

    def take(self, packs: bool, rows: int) -> None:
        """The weights as they are now."""
        bases = [_base(layer) for layer in self.layers]
        if (self.weight is None and self.strips is None) or not self.is_frozen:
            joined = torch.cat([base.weight.detach() for base in bases]) if len(bases) > 1 else bases[0].weight.detach()
            self.bias = None
            if getattr(bases[0], "bias", None) is not None:  # PEFT's wrapper of a tied head has none
                self.bias = torch.cat([base.bias.detach() for base in bases])
            if packs and _has_strips(joined):
                self.strips = Strips.of(joined, self.bias)
            else:
                self.is_packed = packs and joined.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
                self.weight = self._laid_out(joined, rows)
        self._take_adapters(bases[0].weight.dtype, rows)

    def _take_adapters(self, dtype: torch.dtype, rows: int) -> None:
        a, b = self._adapters(dtype)
        if self.strips is not None:
            self.strips.adapt(a, b)
        else:
            self.a, self.b = (None if one is None else self._laid_out(one, rows) for one in (a, b))

    def _adapters(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A's of all layers one below the other, B's with their scales as a block diagonal."""
        found = [(layer, _adapter(layer)) for layer in self.layers]
        if not any(name for _, name in found):
            return None, None
        parts = []
        for layer, name in found:
            weight = _base(layer).weight
            if name is None:
                parts.append((weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)))
            else:
                _, _, a, b, scale, _ = layer.parts(name)  # type: ignore[operator]
                parts.append((a.detach().to(dtype), (b.detach() * scale).to(dtype)))
        return torch.cat([a for a, _ in parts]), torch.block_diag(*(b for _, b in parts))

    def _laid_out(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) if self.is_packed else weight

    @property
    def num_bytes(self) -> int:
        """Of the weights themselves, without adapters."""
        return sum(_base(layer).weight.nbytes for layer in self.layers)

    @property
    def width(self) -> int:
        return int(_base(self.layers[0]).weight.shape[1])

    def alone(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Without the adapters."""
        if self.strips is not None:
            return self._by_strips(self.strips, x_BD, None, adapted=False)
        assert self.weight is not None
        return self._linear(x_BD, self.weight, self.bias, None)

    def __call__(self, x_BD: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """`plus` is what the result is added to."""
        if self.strips is not None:
            return self._by_strips(self.strips, x_BD, plus)
        assert self.weight is not None
        y = self._linear(x_BD, self.weight, self.bias, plus)
        if self.a is not None and self.b is not None:
            y = self._linear(self._linear(x_BD, self.a, None, None), self.b, None, y)
        return y

    def _by_strips(
        self, strips: Strips, x_BD: torch.Tensor, plus: torch.Tensor | None, adapted: bool = True
    ) -> torch.Tensor:
        if x_BD.dtype != strips.dtype:
            raise ValueError(f"{x_BD.dtype} times weights in {strips.dtype}")
        kernels = native.kernels_for(x_BD)
        assert kernels is not None
        a, b, rank = (strips.a, strips.b, strips.rank) if adapted else (None, None, 0)
        more = None if plus is None else plus.contiguous()
        return kernels.linear(x_BD.contiguous(), (strips.weight, strips.bias, a, b), (strips.out, rank), more)

    def _linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plus: torch.Tensor | None
    ) -> torch.Tensor:
        """`x W' + bias + plus`, in one call where the weight is packed."""
        if not self.is_packed:
            y = torch.nn.functional.linear(x, weight, bias)
            return y if plus is None else plus + y
        own = torch.ops.mkldnn._linear_pointwise
        return own(x, weight, bias, "none", [], "") if plus is None else own.binary(x, plus, weight, bias, "add")


def _has_strips(weight: torch.Tensor) -> bool:
    return weight.shape[1] % per_word(weight.dtype) == 0 and native.kernels_for(weight) is not None


def _base(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LeanLora) else layer


def _adapter(layer: nn.Module) -> str | None:
    return layer.ordinary_adapter() if isinstance(layer, LeanLora) else None


@dataclass
class LeanLayer:
    """`norms` before attention and before the feed-forward part, `head_norms` of queries and keys (Qwen 3)."""

    index: Any
    norms: tuple[Any, Any]
    head_norms: tuple[Any, Any] | None
    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    width: int
    window: int | None


class LeanWeights:
    """A policy's weights as lean decoding wants them; `take` after every update."""

    def __init__(self, policy: Policy, layers: list[LeanLayer], sizes: tuple[int, int, int], scale: float):
        self.policy, self.layers = policy, layers
        self.heads, self.key_heads, self.head_size = sizes
        self.scale = scale
        self.head = Product([policy.base.get_output_embeddings()])

    @classmethod
    def of(cls, policy: Policy) -> LeanWeights | None:
        """None for a model with layers of another kind."""
        body = policy.base.base_model
        found = [_layer(layer) for layer in getattr(body, "layers", [])]
        needed = all(hasattr(body, name) for name in ("rotary_emb", "norm", "embed_tokens"))
        if not policy.is_packed or not needed or not found or any(layer is None for layer in found):
            return None
        layers = [layer for layer in found if layer is not None]
        first = body.layers[0].self_attn
        size = int(first.head_dim)
        sizes = (_rows(first.q_proj) // size, _rows(first.k_proj) // size, size)
        scales = {float(layer.self_attn.scaling) for layer in body.layers}
        return cls(policy, layers, sizes, scales.pop()) if len(scales) == 1 else None

    def take(self, rows: int) -> None:
        """The weights as they are now. Packed where that is worth it and there is room for a second copy of them."""
        packs = self._packs
        with torch.no_grad():
            for product in (*self.products(), self.head):
                product.take(packs, rows)

    @property
    def _packs(self) -> bool:
        """Where there is room for a second copy beside masters, gradients and moments of what is trained."""
        parameters = list(self.policy.base.parameters())
        size, trained = sum(p.nbytes for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        dtype, device = self.policy.base.get_input_embeddings().weight.dtype, self.policy.device
        if device.type != "cpu" or total_memory(device) <= 4 * size + OF_TRAINED * trained:
            return False
        by_library = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        return by_library or native.kernels(dtype) is not None

    @property
    def num_bytes(self) -> int:
        """What `take` makes beside the model's own: all weights where they are packed, or those that are joined."""
        packs = self._packs
        return sum(one.num_bytes for one in (*self.products(), self.head) if packs or len(one.layers) > 1)

    @property
    def reach(self) -> int | None:
        """How far back every layer looks; None for as far as there is anything."""
        return min((layer.window for layer in self.layers if layer.window is not None), default=None)

    def products(self) -> list[Product]:
        """Those of all layers, in order."""
        return [product for one in self.layers for product in (one.qkv, one.out, one.gate_up, one.down)]


def _layer(layer: Any) -> LeanLayer | None:
    if {name for name, _ in layer.named_children()} != PARTS:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    linear: list[Any] = [getattr(attention, name, None) for name in PROJECTIONS]
    linear += [getattr(mlp, name, None) for name in GATED]
    head_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    is_usual = (
        all(_is_linear(one) for one in linear)
        and {name for name, _ in attention.named_children()} <= {*PROJECTIONS, "q_norm", "k_norm"}
        and {name for name, _ in mlp.named_children()} <= {*GATED, "act_fn"}
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and not has_caps(attention, attention.config)
        and ((head_norms[0] is None) == (head_norms[1] is None))
        and len({_base(one).bias is None for one in linear[:3]}) == 1
    )
    if not is_usual:
        return None
    q, k, v, out, gate, up, down = linear
    return LeanLayer(
        attention.layer_idx, norms, None if head_norms[0] is None else head_norms, Product([q, k, v]), Product([out]),
        Product([gate, up]), Product([down]), _rows(gate),
        window_of(attention),
    )  # fmt: skip


def _is_linear(layer: Any) -> bool:
    if isinstance(layer, LeanLora):
        return layer.ordinary_adapter() is not None or bool(layer._disable_adapters)
    return type(layer) is nn.Linear


def _rows(layer: nn.Module) -> int:
    return int(_base(layer).weight.shape[0])
