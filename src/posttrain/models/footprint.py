"""What a training step needs in memory, by formula: so many bytes for parameters, so many for each token.

Counted is what autograd keeps for the backward pass, layer by layer: the inputs of linear layers whose weight (or
adapter) learns, a norm's input, queries, keys, values and the output of attention with its weights where they are kept,
gate and up projection of a feed-forward layer; then the head's buffers and, where it learns, its gradient; gradients
and the optimiser's state. Layers that are not of the usual kind (models/lean_layers.py) keep more, by factors read off
their formulas; a family that keeps something else altogether is what the planner's probe is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from posttrain import native
from posttrain.models.fused_attention import has_caps
from posttrain.models.head import BLOCK_SIZE, CHUNK_ROWS, SLICE_ROWS
from posttrain.models.precision import has_fast_bf16
from posttrain.models.segment_attention import MAX_LENGTH
from posttrain.native.kernels import LANES

STATE_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0, "sgd": 0, "adagrad": 4, "rmsprop": 4, "lion": 4}
"""An optimiser's state for each parameter, by a word of its name; Adam and its kin have two fp32 moments."""
OVERHEAD = 1.1
"""Temporaries that are not counted one by one, and what the allocator rounds up."""


@dataclass(frozen=True)
class Footprint:
    """Bytes. `kept` is for one token with the levels of models/recomputation.py; `weights` for one token and each token
    of its sequence; `layer` for one token of the layer that is being computed; `head` while the head is."""

    gradients: int
    waiting: int
    copies: int
    optimizer: int
    kept: Mapping[str, float]
    weights: Mapping[str, float]
    layer: float
    head: int

    def step(self, level: str, tokens: int, longest: int, micro_batches: int, *, sheds_copies: bool = False) -> int:
        """What a step needs beside the parameters and the optimiser's state, at its worst moment: the last backward
        begins, or the optimiser has its turn, perhaps without the computing copies. A first micro-batch's gradients
        wait in the compute dtype."""
        before = {1: 0, 2: self.waiting}.get(micro_batches, self.gradients)
        activations = tokens * (self.kept[level] + self.weights[level] * min(longest, MAX_LENGTH))
        passing = max(self.head, tokens * self.layer)
        update = self.gradients - (self.copies if sheds_copies else 0)
        return int(max((activations + passing) * OVERHEAD + before, update))

    def and_activations_of(self, other: Footprint) -> Footprint:
        """Of two models that keep what they compute for the same backward pass."""
        return replace(
            self,
            kept={level: size + other.kept[level] for level, size in self.kept.items()},
            weights={level: size + other.weights[level] for level, size in self.weights.items()},
            layer=max(self.layer, other.layer),
        )


def footprint(base: Any, trained: Mapping[str, nn.Parameter], lean: set[nn.Module], optimizer: str) -> Footprint:
    """Of `base` as it is opened for training; `trained` are masters and adapters, `optimizer` is its name."""
    output = base.get_output_embeddings()
    head = base.get_input_embeddings().weight if output is None else output.weight  # a score's head is next to nothing
    count = sum(parameter.numel() for parameter in trained.values())
    adapters = sum(p.numel() for p in base.parameters() if p.requires_grad and p.dtype == torch.float32)
    low = head.element_size() if head.element_size() < 4 else 0
    per_parameter = next((size for word, size in STATE_BYTES.items() if word in optimizer.lower()), 8)
    layers = [_Layer(layer, lean, base.config.get_text_config(), head) for layer in _layers(base)]
    widest = max((layer.working for layer in layers), default=0.0)
    inputs = len(layers) * base.config.get_text_config().hidden_size * head.element_size()
    largest = max((layer.kept for layer in layers), default=0.0)
    keeps_weights = low == 2 and head.device.type == "cpu" and not native.runs(head.device, head.dtype)
    weights = sum(layer.weights for layer in layers) if keeps_weights else 0.0
    return Footprint(
        gradients=4 * count,
        waiting=low * (count - adapters) + 4 * adapters if low else 4 * count,
        copies=low * (count - adapters),
        optimizer=per_parameter * count,
        kept={
            "none": sum(layer.kept for layer in layers),
            "selective": sum(layer.kept - layer.cheap for layer in layers),
            "full": inputs + largest,
        },
        weights={"none": weights, "selective": 0.0, "full": weights / max(1, len(layers))},
        layer=widest,
        head=0 if output is None else _head_bytes(head),
    )


def _head_bytes(weight: torch.Tensor) -> int:
    """A chunk in the compute dtype, two fp32 buffers of a block, and the gradient of a weight that learns: added up in
    fp32, handed over in its own dtype."""
    vocabulary, hidden = weight.shape
    block = min(CHUNK_ROWS * vocabulary, max(vocabulary, BLOCK_SIZE.get(weight.device.type, CHUNK_ROWS * vocabulary)))
    buffers = CHUNK_ROWS * vocabulary * weight.element_size() + 2 * 4 * block
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not has_fast_bf16(weight.device):
        buffers += weight.element_size() * vocabulary * hidden  # products are emulated, from a copy of the weight
    if not weight.requires_grad:
        return buffers
    low = weight.element_size() if weight.element_size() < 4 else 0
    last = low * vocabulary * hidden
    return 4 * vocabulary * hidden + max(last, buffers + weight.element_size() * min(SLICE_ROWS, vocabulary) * hidden)


def _layers(base: Any) -> list[nn.Module]:
    """The repeated blocks."""
    number = base.config.get_text_config().num_hidden_layers
    lists = (module for module in base.base_model.modules() if isinstance(module, nn.ModuleList))
    return list(next((found for found in lists if len(found) == number), ()))


class _Layer:
    """`kept` bytes a token, of which `cheap` are made again at the level `selective`; `weights` of attention, by token
    and token of its sequence; `working` while it is computed."""

    def __init__(self, layer: nn.Module, lean: set[nn.Module], config: Any, head: torch.Tensor):
        self.kept = self.cheap = self.weights = self.working = 0.0
        self._size, self._config = head.element_size(), config
        self._has_kernels = native.runs(head.device, head.dtype)
        learns = any(parameter.requires_grad for parameter in layer.parameters())
        for name, module in layer.named_modules():
            last = name.rpartition(".")[2]
            if _is_norm(module):
                self._norm(last, module, module in lean)
            elif last in ("o_proj", "c_proj", "out_proj") and "mlp" not in name:
                self._attention(_width(module, 1), _parent(layer, name), _is_convolution(layer))
            elif last in ("down_proj", "w2") or (last == "c_proj" and "mlp" in name):
                self._feed_forward(_width(module, 1), _parent(layer, name) in lean, learns)
        self._adapters(layer)

    def _norm(self, name: str, module: Any, is_lean: bool) -> None:
        times = {"q_norm": self._heads, "k_norm": self._key_heads, "q_layernorm": self._heads,
                 "k_layernorm": self._key_heads}.get(name, 1)  # fmt: skip
        width = times * module._parameters["weight"].numel()
        self.kept += width * (self._size if is_lean or isinstance(module, nn.LayerNorm) else 8 + self._size)
        if times == 1:  # a linear layer reads it
            self.kept += width * self._size
            self.cheap += width * self._size if is_lean else 0

    @property
    def _heads(self) -> int:
        return self._config.num_attention_heads

    @property
    def _key_heads(self) -> int:
        return getattr(self._config, "num_key_value_heads", None) or self._heads

    def _attention(self, width: int, module: Any, is_convolution: bool) -> None:
        """Queries, keys, values and what comes out; a short convolution keeps its three signals and their products."""
        if is_convolution:
            self.kept += 8 * width * self._size
            return
        is_known = width // self._heads % LANES == 0 and not has_caps(module, self._config)
        in_one = self._size == 2 or (self._has_kernels and is_known)
        copies = 2 if in_one else 3  # a loop of SDPA over segments has its output twice
        self.kept += width * self._size * (copies + 2 * self._key_heads / self._heads)
        self.weights += self._heads * self._size
        self.working = max(self.working, 6 * width * self._size)

    def _feed_forward(self, width: int, is_lean: bool, learns: bool) -> None:
        self.kept += width * self._size * (2 if is_lean else 3 + learns)
        tensors = 4 if self._has_kernels and is_lean else 5  # kernels make three in one pass, without a fourth
        self.working = max(self.working, tensors * width * self._size)

    def _adapters(self, layer: Any) -> None:
        """LoRA's inner product, and with dropout the dropped input and its mask."""
        for module in layer.modules():
            if isinstance(module, LoraLayer):
                for name, a in module.lora_A.items():
                    self.kept += a.weight.shape[0] * self._size
                    if getattr(module.lora_dropout[name], "p", 0):
                        self.kept += 2 * a.weight.shape[1] * self._size


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1


def _is_convolution(layer: nn.Module) -> bool:
    return any(type(module).__name__.endswith("ShortConv") for module in layer.modules())


def _width(module: Any, axis: int) -> int:
    """Features in; transformers' Conv1D has its weight the other way round, PEFT's layers hold it further in."""
    weight = getattr(module, "base_layer", module).weight
    return int(weight.shape[0 if type(getattr(module, "base_layer", module)).__name__ == "Conv1D" else axis])


def _parent(layer: nn.Module, name: str) -> nn.Module:
    return layer.get_submodule(name.rpartition(".")[0])
