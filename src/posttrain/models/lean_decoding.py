"""Decoding without the detours, for models whose layers are of the usual kind (Llama, Mistral, Qwen 2 and 3, SmolLM).

A step of decoding is a few hundred small products, so what costs is everything around them: module calls, copies, and
weights that are laid out anew for every product. Here each layer's projections are joined (query, key and value; gate
and up) and, on a CPU in bf16, packed once as oneDNN wants them: what is frozen once and for all, what is trained after
each update. Every row has keys and values of its own, prompt included, in buffers that grow by whole blocks, so that
shapes repeat and products find the kernels made for them.

The arithmetic is the model's own, dtype for dtype. A model for which it is not, by its layers' names or by the numbers
of a short trial, is decoded by its own forward (models/decoding.py).

Shape suffixes: `B` rows, `K` key heads, `G` query heads of a key head, `E` head size, `S` places for tokens, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posttrain.models.adapters import LeanLora
from posttrain.models.available import total_memory
from posttrain.models.decoding import Memory
from posttrain.models.forward import Policy

BLOCK = 64
"""Places for tokens by which buffers grow."""
IDLE = 8
"""One row in so many may be idle before the others move together."""
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


class _Product:
    """`y = x W' + b` of several layers with the same input, with their adapters' `s A' B'`."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        bases = [_base(layer) for layer in layers]
        self.is_frozen = not any(base.weight.requires_grad for base in bases)
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.is_packed = False
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None

    def take(self, packs: bool, rows: int) -> None:
        """The weights as they are now."""
        bases = [_base(layer) for layer in self.layers]
        if self.weight is None or not self.is_frozen:
            joined = torch.cat([base.weight.detach() for base in bases]) if len(bases) > 1 else bases[0].weight.detach()
            self.is_packed = packs and joined.dtype == torch.bfloat16
            self.weight = _packed(joined, rows) if self.is_packed else joined
            self.bias = None
            if bases[0].bias is not None:
                self.bias = torch.cat([base.bias.detach() for base in bases])
        self._take_adapters(self.bias.dtype if self.bias is not None else bases[0].weight.dtype)

    def _take_adapters(self, dtype: torch.dtype) -> None:
        found = [(layer, _adapter(layer)) for layer in self.layers]
        if not any(name for _, name in found):
            self.a = self.b = None
            return
        parts = []
        for layer, name in found:
            weight = _base(layer).weight
            if name is None:
                parts.append((weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)))
            else:
                _, _, a, b, scale, _ = layer.parts(name)  # type: ignore[operator]
                parts.append((a.detach().to(dtype), (b.detach() * scale).to(dtype)))
        self.a = torch.cat([a for a, _ in parts]).t()
        self.b = torch.block_diag(*(b for _, b in parts)).t().contiguous()

    def __call__(self, x_BD: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        if self.is_packed:
            y = torch.ops.mkldnn._linear_pointwise(x_BD, self.weight, self.bias, "none", [], "")
        else:
            y = torch.nn.functional.linear(x_BD, self.weight, self.bias)
        if self.a is not None and self.b is not None:
            y.addmm_(x_BD @ self.a, self.b)
        return y  # type: ignore[no-any-return]


def _base(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LeanLora) else layer


def _adapter(layer: nn.Module) -> str | None:
    return layer.ordinary_adapter() if isinstance(layer, LeanLora) else None


def _packed(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # type: ignore[no-any-return]


@dataclass
class _Layer:
    """`norms` before attention and before the feed-forward part, `head_norms` of queries and keys (Qwen 3)."""

    index: Any
    norms: tuple[Any, Any]
    head_norms: tuple[Any, Any] | None
    qkv: _Product
    out: _Product
    gate_up: _Product
    down: _Product
    width: int
    window: int | None


class LeanWeights:
    """A policy's weights as lean decoding wants them; `take` after every update."""

    def __init__(self, policy: Policy, layers: list[_Layer], sizes: tuple[int, int, int], scale: float):
        self.policy, self.layers = policy, layers
        self.heads, self.key_heads, self.head_size = sizes
        self.scale = scale
        self.head = _Product([policy.base.get_output_embeddings()])

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
        size = sum(p.numel() * p.element_size() for p in self.policy.base.parameters())
        on_cpu = self.policy.device.type == "cpu"
        packs = on_cpu and torch.backends.mkldnn.is_available() and total_memory(self.policy.device) > 4 * size
        with torch.no_grad():
            for product in self._products():
                product.take(packs, rows)

    @property
    def reach(self) -> int | None:
        """How far back every layer looks; None for as far as there is anything."""
        return min((layer.window for layer in self.layers if layer.window is not None), default=None)

    def _products(self) -> list[_Product]:
        each = (product for one in self.layers for product in (one.qkv, one.out, one.gate_up, one.down))
        return [*each, self.head]


def _layer(layer: Any) -> _Layer | None:
    if {name for name, _ in layer.named_children()} != PARTS:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    linear = [getattr(attention, name, None) for name in PROJECTIONS] + [getattr(mlp, name, None) for name in GATED]
    head_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    is_usual = (
        all(_is_linear(one) for one in linear)
        and {name for name, _ in attention.named_children()} <= {*PROJECTIONS, "q_norm", "k_norm"}
        and {name for name, _ in mlp.named_children()} <= {*GATED, "act_fn"}
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and ((head_norms[0] is None) == (head_norms[1] is None))
        and len({_base(one).bias is None for one in linear[:3]}) == 1
    )
    if not is_usual:
        return None
    q, k, v, out, gate, up, down = linear
    return _Layer(
        attention.layer_idx, norms, None if head_norms[0] is None else head_norms, _Product([q, k, v]), _Product([out]),
        _Product([gate, up]), _Product([down]), _rows(gate),
        getattr(attention, "sliding_window", None) or _window(attention),
    )  # fmt: skip


def _window(attention: Any) -> int | None:
    """Mistral says it for all layers alike."""
    config = attention.config
    return None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)


def _is_linear(layer: Any) -> bool:
    if isinstance(layer, LeanLora):
        return layer.ordinary_adapter() is not None or bool(layer._disable_adapters)
    return type(layer) is nn.Linear


def _rows(layer: nn.Module) -> int:
    return int(_base(layer).weight.shape[0])


def lean_weights(policy: Policy) -> LeanWeights | None:
    """For lean decoding of `policy`, if a short trial gives its own forward's numbers."""
    weights = LeanWeights.of(policy)
    if weights is None:
        return None
    weights.take(rows=2)
    vocabulary = policy.vocabulary
    prompts = [[(7919 * i + 13 * n) % vocabulary for i in range(n)] for n in (5, 3)]
    lengths = [len(prompt) for prompt in prompts]
    ids = [[11 % vocabulary, 29 % vocabulary], [7 % vocabulary, 31 % vocabulary]]
    with torch.no_grad():
        found = []
        for lean in (False, True):
            memory = Memory(room=len(ids))
            forward(policy, sum(prompts, []), torch.cat([torch.arange(n) for n in lengths]),
                    memory.reading(lengths, [0, 1]))  # fmt: skip
            rows: Any = LeanRows(weights, memory, 2) if lean else SharedRows(policy, memory)
            for number in (0, 1):
                rows.admit(number, 1)
            found.append(torch.stack([rows.step(step).float() for step in ids]))
    expected, seen = found
    allowed = policy.tolerance * max(1.0, expected.abs().max().item())
    return weights if (expected - seen).abs().max().item() <= allowed else None


class SharedRows:
    """Rows that go through the model's own forward and share their prompts' keys and values (models/decoding.py)."""

    def __init__(self, policy: Policy, memory: Memory):
        self.policy, self.memory = policy, memory

    def make_room(self, rows: int) -> None:
        pass

    def admit(self, number: int, rows: int) -> None:
        self.memory.admit(number, rows)

    def keep(self, rows: Sequence[int]) -> None:
        self.memory.keep(rows)

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        hidden_BD = forward(self.policy, ids, self.memory.positions(), self.memory)
        self.memory.advance()
        return hidden_BD


def forward(policy: Policy, ids: Sequence[int], positions_T: torch.Tensor, layout: Any) -> torch.Tensor:
    """Hidden states of the model's own forward, `(T, D)`."""
    device = policy.device
    output = policy.base.base_model(
        input_ids=torch.tensor(ids, device=device)[None],
        position_ids=positions_T[None].to(device),
        attention_mask=torch.empty(1, 1, 0, 0, device=device),  # one of four dimensions is handed through as it is
        layout=layout,
        use_cache=False,
    )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


class LeanRows:
    """The rows of one call of `generate`. Each has a place in every buffer; `places` are those of the living, in the
    order in which they are asked for."""

    def __init__(self, weights: LeanWeights, memory: Memory, capacity: int):
        self.weights, self.memory, self.capacity = weights, memory, capacity
        self.places: list[int] = []
        self.length_B = torch.zeros(capacity, dtype=torch.long)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.mask_B1S = torch.zeros(0)
        self.room = 0

    # --- rows ---------------------------------------------------------------------------------------------------------

    def admit(self, number: int, rows: int) -> None:
        """`rows` more, behind the others, that go on from prompt `number`."""
        taken = set(self.places)
        fresh = [place for place in range(self.capacity) if place not in taken][:rows]
        assert len(fresh) == rows
        length = self.memory.lengths[number]
        self._grow(length + 1)
        for layer, keys_BKES, values_BKSE in zip(self.weights.layers, self.keys, self.values, strict=True):
            keys_KEP, values_KPE = self.memory.prompt(layer.index, number)
            keys_BKES[fresh, :, :, :length] = keys_KEP
            values_BKSE[fresh, :, :length] = values_KPE
        self.length_B[fresh] = length
        self.mask_B1S[fresh] = -torch.inf
        self.mask_B1S[fresh, :, :length] = 0
        self.places += fresh

    def keep(self, rows: Sequence[int]) -> None:
        """Only these, in order; the others are done."""
        self.places = [self.places[row] for row in rows]
        if self.capacity - len(self.places) > self.capacity // IDLE and self.places:
            self._move_together()

    def _move_together(self) -> None:
        index = torch.tensor(self.places)
        at = index.to(self.mask_B1S.device)
        self.keys = [keys[at] for keys in self.keys]
        self.values = [values[at] for values in self.values]
        self.mask_B1S, self.length_B = self.mask_B1S[at], self.length_B[index]
        self.capacity, self.places = len(self.places), list(range(len(self.places)))

    def make_room(self, rows: int) -> None:
        """Places for `rows` more."""
        wanted = len(self.places) + rows
        if wanted <= self.capacity:
            return
        more = wanted - self.capacity
        self.keys = [torch.cat([keys, keys.new_zeros(more, *keys.shape[1:])]) for keys in self.keys]
        self.values = [torch.cat([values, values.new_zeros(more, *values.shape[1:])]) for values in self.values]
        self.mask_B1S = torch.cat([self.mask_B1S, self.mask_B1S.new_zeros(more, 1, self.room)])
        self.length_B = torch.cat([self.length_B, self.length_B.new_zeros(more)])
        self.capacity = wanted

    def _grow(self, length: int) -> None:
        """Places for `length` tokens in every row."""
        if length <= self.room:
            return
        room = -(-length // BLOCK) * BLOCK
        heads, size = self.weights.key_heads, self.weights.head_size
        like = self.weights.policy.base.get_input_embeddings().weight
        if not self.keys:
            for _ in self.weights.layers:
                self.keys.append(like.new_zeros(self.capacity, heads, size, room))
                self.values.append(like.new_zeros(self.capacity, heads, room, size))
            self.mask_B1S = like.new_zeros(self.capacity, 1, room)
        else:
            more = room - self.room
            self.keys = [torch.nn.functional.pad(keys, (0, more)) for keys in self.keys]
            self.values = [torch.nn.functional.pad(values, (0, 0, 0, more)) for values in self.values]
            self.mask_B1S = torch.nn.functional.pad(self.mask_B1S, (0, more), value=-torch.inf)
        self.room = room

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Hidden states `(rows, D)` of one new token for each row."""
        body, device = self.weights.policy.base.base_model, self.mask_B1S.device
        self._grow(int(self.length_B[self.places].max()) + 1)
        row_B, at_B = torch.arange(self.capacity, device=device), self.length_B.clamp(max=self.room - 1).to(device)
        self.mask_B1S[row_B, 0, at_B] = 0
        ids_B = torch.zeros(self.capacity, dtype=torch.long)
        ids_B[self.places] = torch.tensor(ids)
        x_BD = body.embed_tokens(ids_B.to(device))
        turns = self._turns(*(one[0, :, None] for one in body.rotary_emb(x_BD[None], at_B[None])))
        for layer, keys_BKES, values_BKSE in zip(self.weights.layers, self.keys, self.values, strict=True):
            x_BD = self._layer(layer, x_BD, turns, keys_BKES, values_BKSE, row_B, at_B)
        self.length_B += 1
        hidden_BD = body.norm(x_BD)
        if self.places == list(range(self.capacity)):
            return hidden_BD  # type: ignore[no-any-return]
        return hidden_BD[self.places]  # type: ignore[no-any-return]

    def _turns(self, cos_B1E: torch.Tensor, sin_B1E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embeddings (arXiv 2104.09864) of queries and keys, `(B, heads, E)`: what a vector is multiplied by, and
        what its other half is. Queries take the scale of attention's scores along."""
        weights = self.weights
        scale_H1 = torch.ones(weights.heads + weights.key_heads, 1, device=cos_B1E.device)
        scale_H1[: weights.heads] = weights.scale
        half = weights.head_size // 2
        signed = torch.cat((-sin_B1E[..., :half], sin_B1E[..., half:]), -1)
        return tuple((one * scale_H1).to(cos_B1E.dtype) for one in (cos_B1E, signed))  # type: ignore[return-value]

    def _layer(
        self,
        layer: _Layer,
        x_BD: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        keys_BKES: torch.Tensor,
        values_BKSE: torch.Tensor,
        row_B: torch.Tensor,
        at_B: torch.Tensor,
    ) -> torch.Tensor:
        heads, kept, size = self.weights.heads, self.weights.key_heads, self.weights.head_size
        rows = len(x_BD)
        each = layer.qkv(_normed(layer.norms[0], x_BD)).view(rows, heads + 2 * kept, size)
        turned = each[:, : heads + kept]
        if layer.head_norms is not None:
            q, k = (_normed(norm, part) for norm, part in
                    zip(layer.head_norms, turned.split([heads, kept], 1), strict=True))  # fmt: skip
            turned = torch.cat([q, k], 1)
        turned = (turned * turns[0]).addcmul_(turned.roll(size // 2, -1), turns[1])
        keys_BKES[row_B, :, :, at_B] = turned[:, heads:]
        values_BKSE[row_B, :, at_B] = each[:, heads + kept :]
        query = turned[:, :heads].reshape(rows * kept, -1, size)
        score = torch.bmm(query, keys_BKES.view(rows * kept, size, -1))
        score.view(rows, heads, -1).add_(self.mask_B1S)
        weight = score.softmax(-1, dtype=torch.float32).to(x_BD.dtype)
        seen = torch.bmm(weight, values_BKSE.view(rows * kept, -1, size)).view(rows, heads * size)
        x_BD = x_BD + layer.out(seen)
        joined = layer.gate_up(_normed(layer.norms[1], x_BD))
        gated = torch.nn.functional.silu(joined[:, : layer.width]).mul_(joined[:, layer.width :])
        return x_BD + layer.down(gated)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
