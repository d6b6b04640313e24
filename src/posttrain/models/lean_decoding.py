"""Decoding without the detours, for models whose layers are of the usual kind (Llama, Mistral, Qwen 2 and 3, SmolLM).

A step of decoding is a few hundred small products, so what costs is everything around them: module calls, copies, and
weights that are laid out anew for every product. Here each layer's projections are joined and packed
(models/lean_weights.py), and every row has keys and values of its own, prompt included, in buffers that grow by whole
blocks, so that shapes repeat and products find the kernels made for them.

On CUDA a step over these buffers is recorded once for each of their sizes (models/recorded.py).

The arithmetic is the model's own, dtype for dtype. A model for which it is not, by its layers' names or by the numbers
of a short trial, is decoded by its own forward (models/decoding.py).

Shape suffixes: `B` rows, `K` key heads, `E` head size, `P` a prompt's tokens, `S` places for tokens, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.models.decoding import Memory
from posttrain.models.forward import Policy
from posttrain.models.lean_weights import LeanLayer, LeanWeights
from posttrain.models.paged_decoding import PagedRows, can_page
from posttrain.models.recorded import Recording

BLOCK, BLOCK_ON_CUDA = 64, 256
"""Places for tokens by which buffers grow; on CUDA a step is recorded anew for each size."""
TRIAL = 8
"""Tokens that the trial of a model looks back on."""
IDLE, IDLE_ON_CUDA = 8, 2
"""One row in so many may be idle before the others move together; on CUDA they cost next to nothing."""


def lean_weights(policy: Policy) -> LeanWeights | None:
    """For lean decoding of `policy`, if a short trial gives its own forward's numbers."""
    weights = LeanWeights.of(policy)
    if weights is None or (weights.reach is not None and weights.reach < TRIAL):
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
            forward(policy, [*prompts[0], *prompts[1]], torch.cat([torch.arange(n) for n in lengths]),
                    memory.reading(lengths, [0, 1]))  # fmt: skip
            rows: Any = lean_rows(weights, memory, 2) if lean else SharedRows(policy, memory)
            for number in (0, 1):
                rows.admit(number, 1)
            found.append(torch.stack([rows.step(step).float() for step in ids]))
    expected, seen = found
    allowed = policy.tolerance * max(1.0, expected.abs().max().item())
    return weights if (expected - seen).abs().max().item() <= allowed else None


def sampling_bytes(policy: Policy, rows: int, longest: int) -> int:
    """What sampling takes beside the model: weights in their second layout, keys and values of so many rows at once."""
    if not policy.is_packed:  # it cannot be sampled from here
        return 0
    config, weights = policy.base.config.get_text_config(), LeanWeights.of(policy)
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kept = 2 * config.num_hidden_layers * int(getattr(config, "num_key_value_heads", None) or heads) * size
    of_token = kept * policy.base.get_input_embeddings().weight.element_size()
    block = BLOCK_ON_CUDA if policy.device.type == "cuda" else BLOCK
    return rows * -(-longest // block) * block * of_token + (0 if weights is None else weights.num_bytes)


def lean_rows(weights: LeanWeights, memory: Memory, capacity: int) -> LeanRows | PagedRows:
    """Rows for lean decoding; `capacity` of them at first."""
    return PagedRows(weights, memory) if can_page(weights) else LeanRows(weights, memory, capacity)


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
    return output.last_hidden_state[0]


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
        on_cuda = weights.policy.device.type == "cuda"
        self._block, self._idle = (BLOCK_ON_CUDA, IDLE_ON_CUDA) if on_cuda else (BLOCK, IDLE)
        self._recording = Recording()

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
        if self.capacity - len(self.places) > self.capacity // self._idle and self.places:
            self._move_together()

    def _move_together(self) -> None:
        index = torch.tensor(self.places)
        at = index.to(self.mask_B1S.device)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = old[at]
        self.mask_B1S, self.length_B = self.mask_B1S[at], self.length_B[index]
        self.capacity, self.places = len(self.places), list(range(len(self.places)))
        self._recording = Recording()

    def make_room(self, rows: int) -> None:
        """Places for `rows` more."""
        wanted = len(self.places) + rows
        if wanted <= self.capacity:
            return
        more = wanted - self.capacity
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):  # one after the other: all of them twice would be much
                buffers[layer] = torch.cat([old, old.new_zeros(more, *old.shape[1:])])
        self.mask_B1S = torch.cat([self.mask_B1S, self.mask_B1S.new_zeros(more, 1, self.room)])
        self.length_B = torch.cat([self.length_B, self.length_B.new_zeros(more)])
        self.capacity = wanted
        self._recording = Recording()

    def _grow(self, length: int) -> None:
        """Places for `length` tokens in every row."""
        if length <= self.room:
            return
        room = -(-length // self._block) * self._block
        heads, size = self.weights.key_heads, self.weights.head_size
        like = self.weights.policy.base.get_input_embeddings().weight
        if not self.keys:
            for _ in self.weights.layers:
                self.keys.append(like.new_zeros(self.capacity, heads, size, room))
                self.values.append(like.new_zeros(self.capacity, heads, room, size))
            self.mask_B1S = like.new_zeros(self.capacity, 1, room)
        else:
            more = room - self.room
            for buffers, places in ((self.keys, (0, more)), (self.values, (0, 0, 0, more))):
                for layer, old in enumerate(buffers):
                    buffers[layer] = torch.nn.functional.pad(old, places)
            self.mask_B1S = torch.nn.functional.pad(self.mask_B1S, (0, more), value=-torch.inf)
        self.room = room
        self._recording = Recording()

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Hidden states `(rows, D)` of one new token for each row."""
        body, device = self.weights.policy.base.base_model, self.mask_B1S.device
        self._grow(int(self.length_B[self.places].max()) + 1)
        at_B = self.length_B.clamp(max=self.room - 1).to(device)
        ids_B = torch.zeros(self.capacity, dtype=torch.long)
        ids_B[self.places] = torch.tensor(ids)
        x_BD = body.embed_tokens(ids_B.to(device))
        turns = self._turns(*(one[0, :, None] for one in body.rotary_emb(x_BD[None], at_B[None])))
        hidden_BD = self._recording.run(self._through, x_BD, at_B, *turns)
        self.length_B += 1
        if self.places == list(range(self.capacity)):
            return hidden_BD
        return hidden_BD[self.places]

    def _through(self, x_BD: torch.Tensor, at_B: torch.Tensor, *turns: torch.Tensor) -> torch.Tensor:
        """All layers, for a token that stands at `at_B` in its row's buffers."""
        row_B = torch.arange(self.capacity, device=x_BD.device)
        self.mask_B1S.index_put_((row_B, torch.zeros_like(row_B), at_B), self.mask_B1S.new_zeros(()))
        for layer, keys_BKES, values_BKSE in zip(self.weights.layers, self.keys, self.values, strict=True):
            x_BD = self._layer(layer, x_BD, turns, keys_BKES, values_BKSE, row_B, at_B)
        normed_BD: torch.Tensor = self.weights.policy.base.base_model.norm(x_BD)
        return normed_BD

    def _turns(self, cos_B1E: torch.Tensor, sin_B1E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embeddings (arXiv 2104.09864) of queries and keys, `(B, heads, E)`: what a vector is multiplied by,
        and what its other half is. Queries take the scale of attention's scores along."""
        weights = self.weights
        scale_H1 = torch.ones(weights.heads + weights.key_heads, 1, device=cos_B1E.device)
        scale_H1[: weights.heads] = weights.scale
        half = weights.head_size // 2
        signed = torch.cat((-sin_B1E[..., :half], sin_B1E[..., half:]), -1)
        return tuple((one * scale_H1).to(cos_B1E.dtype) for one in (cos_B1E, signed))  # type: ignore[return-value]

    def _layer(
        self,
        layer: LeanLayer,
        x_BD: torch.Tensor,
        turns: tuple[torch.Tensor, ...],
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
        weight = score.softmax(-1)  # in fp32 inside, whatever comes in and goes out
        seen = torch.bmm(weight, values_BKSE.view(rows * kept, -1, size)).view(rows, heads * size)
        x_BD = layer.out(seen, plus=x_BD)
        joined = layer.gate_up(_normed(layer.norms[1], x_BD))
        gated = torch.nn.functional.silu(joined[:, : layer.width]).mul_(joined[:, layer.width :])
        return layer.down(gated, plus=x_BD)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """RMS norm (arXiv 1910.07467) in fp32, in fewer operations than torch takes for it on a CPU."""
    x32 = x.float() if x.dtype != torch.float32 else x.clone()
    length = torch.linalg.vector_norm(x32, 2, -1, True)
    scale = length.square_().div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return x32.mul_(scale).mul_(norm.weight).to(x.dtype)
