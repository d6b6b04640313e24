"""Text → tokens with an exact mask. Every text is tokenised once, as a whole, many at a time.

The completion begins where the tokens of prompt and completion part from those of the prompt alone, as in TRL: usually
at its end; earlier where tokens merge across the boundary, which is reported, for the model is then trained on a
context that it does not see when it is used. What the assistant says is carried from characters to tokens by offsets:
a token that holds both a turn's characters and what stands before or after it is trained, as in TRL. Where flags of the
data part a turn, a token is trained only if all its characters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posttrain.data.render import Rendered
from posttrain.data.rendering import Span
from posttrain.errors import ConfigError
from posttrain.types import Branch, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY = np.zeros(0, dtype=np.int32)


class Tokens(NamedTuple):
    """Ids, and where asked the characters `[start, end)` of each, of shape `(ids, 2)`."""

    ids: np.ndarray
    offsets: np.ndarray | None


@dataclass(frozen=True)
class Encoded:
    """`boundary` tokens are the prompt's, and come before what follows it. `boundary_moved`: the prompt's own tokens do
    not stand unchanged before the completion, or what is trained begins or ends within a token. `num_cut` tokens hold
    characters on both sides of the edge of a flag, and are left out."""

    tokenized: Tokenized
    boundary_moved: bool
    num_cut: int = 0
    boundary: int = 0


@dataclass(frozen=True)
class Encoder:
    """`columns` are the example's columns that stay with its tokens."""

    tokenizer: PreTrainedTokenizerBase
    columns: tuple[str, ...] = ()
    adds_bos: bool = field(init=False)
    adds_eos: bool = field(init=False)

    def __post_init__(self) -> None:
        ids = self.tokenizer("a")["input_ids"]
        object.__setattr__(self, "adds_bos", ids[:1] == [self.tokenizer.bos_token_id])
        object.__setattr__(self, "adds_eos", len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id)

    def encode(self, rendered: list[Rendered]) -> list[Encoded]:
        """One for each of `rendered`, in order."""
        with_spans = any(item.spans is not None for item in rendered)
        whole = self._tokenize([(item.full, item.is_chat) for item in rendered], with_spans)
        prompts = iter(self._tokenize([(item.prompt, item.is_chat) for item in rendered if item.prompt is not None]))
        return [
            self._encoded(item, tokens, next(prompts).ids if item.prompt is not None else None)
            for item, tokens in zip(rendered, whole, strict=True)
        ]

    def _encoded(self, rendered: Rendered, tokens: Tokens, prompt_ids: np.ndarray | None) -> Encoded:
        supervised = np.ones(len(tokens.ids), dtype=bool)
        moved, num_cut, boundary = False, 0, 0
        if prompt_ids is not None:
            if self.adds_eos and not rendered.is_chat:
                prompt_ids = prompt_ids[:-1]
            boundary = common_prefix(prompt_ids, tokens.ids)
            supervised[:boundary] = False
            moved = boundary < len(prompt_ids)
        if rendered.spans is not None and tokens.offsets is not None:
            extents = without_gaps(tokens.offsets)
            supervised &= within(rendered.spans, extents)
            is_cut = holds_any(rendered.cuts, extents) & ~wholly_within(rendered.spans, extents)
            num_cut = int((supervised & is_cut).sum())
            supervised &= ~is_cut
            moved = moved or cut_in_two(rendered.spans, extents, rendered.cuts)
        columns = {name: rendered.example.columns[name] for name in self.columns if name in rendered.example.columns}
        branch = Branch(tokens.ids, supervised)
        return Encoded(Tokenized(EMPTY, (branch,), rendered.example.origin, columns), moved, num_cut, boundary)

    def _tokenize(self, texts: list[tuple[str, bool]], with_offsets: bool = False) -> list[Tokens]:
        """The tokens of each `(text, is chat)`: plain text gets the tokenizer's special tokens, a conversation has its
        own already."""
        chats = iter(self._call([text for text, is_chat in texts if is_chat], False, with_offsets))
        plain = iter(self._call([text for text, is_chat in texts if not is_chat], True, False))
        return [next(chats) if is_chat else self._once(next(plain)) for _, is_chat in texts]

    def _call(self, texts: list[str], add_special_tokens: bool, with_offsets: bool) -> list[Tokens]:
        if not texts:
            return []
        if with_offsets and not self.tokenizer.is_fast:
            hint = "load it with use_fast=True, or use prompt-completion data"
            raise ConfigError("assistant_only_loss needs a fast tokenizer: others cannot tell characters", hint=hint)
        found: Any = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_offsets_mapping=with_offsets,
            verbose=False,
        )
        offsets = found["offset_mapping"] if with_offsets else [None] * len(texts)
        pairs = (None if pair is None else np.array(pair, dtype=np.int64).reshape(-1, 2) for pair in offsets)
        return [
            Tokens(np.array(ids, dtype=np.int32), pair) for ids, pair in zip(found["input_ids"], pairs, strict=True)
        ]

    def _once(self, tokens: Tokens) -> Tokens:
        """Without the second of two special tokens where the text and the tokenizer both brought one."""
        ids = tokens.ids
        if self.adds_bos and len(ids) > 1 and ids[0] == ids[1]:
            ids = ids[1:]
        if self.adds_eos and len(ids) > 1 and ids[-1] == ids[-2] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return Tokens(ids, None)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements two arrays share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def without_gaps(offsets: np.ndarray) -> np.ndarray:
    """`offsets` of shape `(ids, 2)` with every token beginning no later than where the one before it ends: some
    tokenizers leave the white space that a token holds out of its offsets."""
    extents = offsets.copy()
    ends = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))
    extents[:, 0] = np.minimum(offsets[:, 0], ends[:-1])
    return extents


def within(spans: list[Span], offsets: np.ndarray) -> np.ndarray:
    """Which tokens hold a character of any of `spans`."""
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside


def cut_in_two(spans: list[Span], offsets: np.ndarray, cuts: Sequence[int] = ()) -> bool:
    """Whether a token holds characters of `spans` and others, so that its being trained is a choice, not a fact. Where
    flags part them, at `cuts`, is counted by itself."""
    return bool(holds_any([edge for span in spans for edge in span if edge not in cuts], offsets).any())


def wholly_within(spans: list[Span], offsets: np.ndarray) -> np.ndarray:
    """Which tokens hold no character that is in none of `spans`."""
    ends = offsets[:, 1]
    is_in = np.zeros(int(ends.max(initial=0)) + 1, dtype=np.int64)
    for start, end in spans:
        is_in[start:end] = 1
    before = np.concatenate([[0], np.cumsum(is_in)])
    inside: np.ndarray = before[ends] - before[offsets[:, 0]] == ends - offsets[:, 0]
    return inside


def holds_any(places: Sequence[int], offsets: np.ndarray) -> np.ndarray:
    """Which tokens one of `places` lies within, so that it has characters on both sides."""
    found = np.zeros(len(offsets), dtype=bool)
    for place in places:
        found |= (offsets[:, 0] < place) & (place < offsets[:, 1])
    return found
