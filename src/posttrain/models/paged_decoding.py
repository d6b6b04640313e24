"""Lean decoding through the native kernels (posttrain/native), with keys and values in pages.

A page holds 64 tokens for all layers and key heads. What a prompt has said stands in pages of its own that all rows of
its group read; each row's tokens go into further pages, which other rows take over when it leaves. So nothing moves
when rows come, go or grow, and a prompt is there once (paged attention, arXiv 2309.06180).

Shape suffixes: `B` rows, `N` pages of a row, `K` key heads, `E` head size, `P` a prompt's tokens, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain import native
from posttrain.models.decoding import Memory
from posttrain.models.lean_weights import LeanLayer, LeanWeights
from posttrain.native.kernels import LANES, per_word
from posttrain.native.strips import StripLayer, as_table

PAGE = 64
"""Tokens of a page; native/source/decoding.cpp says so too."""


def can_page(weights: LeanWeights) -> bool:
    """Whether the kernels know this model's heads, turned whole, and have its weights."""
    if weights.policy.device.type != "cpu":
        return False
    body = weights.policy.base.base_model
    x_D = weights.policy.base.get_input_embeddings().weight[:1]
    turns = body.rotary_emb(x_D[None], torch.zeros(1, 1, dtype=torch.long))
    are_whole = all(one.shape[-1] == weights.head_size for one in turns) and weights.head_size % LANES == 0
    norms = [norm.weight for layer in weights.layers for norm in (*layer.norms, *(layer.head_norms or ()))]
    have_strips = all(one.strips is not None and one.strips.dtype == x_D.dtype for one in weights.products())
    return are_whole and have_strips and native.kernels_for(x_D, *turns, *norms, body.norm.weight) is not None


@dataclass
class _Page:
    """`words`: layer, key head, keys and values, as the kernels want them. `used` of its places are in use."""

    words: torch.Tensor
    used: int = 0


@dataclass
class _Place:
    """A row: the prompt it goes on from, and pages for its own tokens."""

    prompt: int
    length: int
    pages: list[_Page] = field(default_factory=list)


class PagedRows:
    """The rows of one call of `generate`, in the order in which they are asked for."""

    def __init__(self, weights: LeanWeights, memory: Memory):
        self.weights, self.memory = weights, memory
        self._dtype = weights.policy.base.get_input_embeddings().weight.dtype
        self._layers = as_table([_strip_layer(layer) for layer in weights.layers])
        self.places: list[_Place] = []
        self._prompts: dict[int, list[_Page]] = {}
        self._free: list[torch.Tensor] = []
        self._pages_BN = self._counts_BN = self._last_B = torch.zeros(0)
        self._is_laid_out = False

    # --- rows ---------------------------------------------------------------------------------------------------------

    def make_room(self, rows: int) -> None:
        pass

    def admit(self, number: int, rows: int) -> None:
        """`rows` more, behind the others, that go on from prompt `number`."""
        if number not in self._prompts:
            self._prompts[number] = self._pages_of(number)
        self.places += [_Place(number, self.memory.lengths[number]) for _ in range(rows)]
        self._is_laid_out = False

    def keep(self, rows: Sequence[int]) -> None:
        """Only these, in order; the others are done."""
        staying = set(rows)
        for index, place in enumerate(self.places):
            if index not in staying:
                self._free += [page.words for page in place.pages]
        self.places = [self.places[row] for row in rows]
        wanted = {place.prompt for place in self.places} | set(self.memory.lengths)
        for number in [number for number in self._prompts if number not in wanted]:
            self._free += [page.words for page in self._prompts.pop(number)]
        self._is_laid_out = False

    def _page(self) -> torch.Tensor:
        """Zeros, or what somebody has left: places that are not in use weigh nothing."""
        if self._free:
            return self._free.pop()
        weights = self.weights
        words = PAGE // per_word(self._dtype) * weights.head_size
        return torch.zeros(len(weights.layers), weights.key_heads, 2, words, dtype=torch.int32)

    def _pages_of(self, number: int) -> list[_Page]:
        """What the model has kept of a prompt."""
        length, size, per = self.memory.lengths[number], self.weights.head_size, per_word(self._dtype)
        pages = [_Page(self._page(), min(PAGE, length - start)) for start in range(0, length, PAGE)]
        for index, layer in enumerate(self.weights.layers):
            keys_KEP, values_KPE = self.memory.prompt(layer.index, number)
            heads = len(keys_KEP)
            keys = keys_KEP.view(heads, size // per, per, length).transpose(2, 3)
            values = torch.nn.functional.pad(values_KPE, (0, 0, 0, -length % per)).view(heads, -1, per, size).mT
            for at, page in enumerate(pages):
                start, stop = at * PAGE, at * PAGE + page.used
                both = page.words[index].view(self._dtype)
                both[:, 0].view(heads, size // per, PAGE, per)[:, :, : page.used] = keys[:, :, start:stop]
                down = both[:, 1].view(heads, PAGE // per, size, per)
                down[:, : -(-page.used // per)] = values[:, start // per : -(-stop // per)]
        return pages

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Hidden states `(rows, D)` of one new token for each row."""
        weights, body = self.weights, self.weights.policy.base.base_model
        self._make_place()
        position_B = torch.tensor([place.length for place in self.places])
        x_BD = body.embed_tokens(torch.tensor(ids))
        turns: Any = tuple(one[0].contiguous() for one in body.rotary_emb(x_BD[None], position_B[None]))
        kernels = native.kernels_for(x_BD, *turns)
        assert kernels is not None
        sizes = weights.heads, weights.key_heads, weights.head_size
        kernels.decode(x_BD, self._layers, turns, self._pages_BN, self._counts_BN, sizes, weights.scale)
        for place in self.places:
            place.length += 1
        return kernels.normed(x_BD, body.norm.weight, body.norm.variance_epsilon)

    def _make_place(self) -> None:
        """For one token more in every row."""
        for place in self.places:
            if not place.pages or place.pages[-1].used == PAGE:
                place.pages.append(_Page(self._page()))
                self._is_laid_out = False
            place.pages[-1].used += 1
        if self._is_laid_out:
            self._counts_BN[torch.arange(len(self.places)), self._last_B] += 1
            return
        pages = [[*self._prompts[place.prompt], *place.pages] for place in self.places]
        most = max(len(row) for row in pages)
        self._pages_BN = torch.tensor(
            [[page.words.data_ptr() for page in row] + [0] * (most - len(row)) for row in pages]
        )
        self._counts_BN = torch.tensor([[page.used for page in row] + [0] * (most - len(row)) for row in pages],
                                       dtype=torch.int32)  # fmt: skip
        self._last_B = torch.tensor([len(row) - 1 for row in pages])
        self._is_laid_out = True


def _strip_layer(layer: LeanLayer) -> StripLayer:
    qkv, back, gate_up, down = (one.strips for one in (layer.qkv, layer.out, layer.gate_up, layer.down))
    assert qkv is not None
    assert back is not None
    assert gate_up is not None
    assert down is not None
    head_norms = layer.head_norms
    return StripLayer(
        norms=(layer.norms[0].weight, layer.norms[1].weight),
        epsilons=(layer.norms[0].variance_epsilon, layer.norms[1].variance_epsilon),
        head_norms=None if head_norms is None else (head_norms[0].weight, head_norms[1].weight),
        head_epsilon=0.0 if head_norms is None else head_norms[0].variance_epsilon,
        qkv=qkv,
        back=back,
        gate_up=gate_up,
        down=down,
    )
