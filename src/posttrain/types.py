"""The values that pass between the parts: what a row says, its tokens, a packed batch, and what the model made of it.

Shape suffixes, here and everywhere: `T` packed tokens, `R` supervised rows (one per predicted token), `S` sequences,
`V` vocabulary, `D` hidden size.

A packed batch holds many sequences end to end and no padding. `rows_R` names the hidden states that predict a
supervised token, `target_R` those tokens, `sequence_R` the sequence each belongs to. Objectives see only `Outputs` and
`Batch`, so they cannot tell how the tokens were laid out or cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

Message = dict[str, Any]
Content = str | list[Message]
"""One part of an example: plain text, or a list of chat messages."""


@dataclass(frozen=True)
class Origin:
    """Where a row came from, so that every complaint about it can say so."""

    source: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line is not None else f"{self.source}[{self.row}]"


@dataclass(frozen=True)
class Example:
    """One prompt and its completions, as written: text, or chat messages.

    `prompt` is None where the format has none (plain text, a whole conversation); the single completion then is the
    text or the conversation; `is_ended` says that its end was written by a template. Supervised data has one
    completion, a preference pair two, a prompt for sampling none.
    """

    prompt: Content | None
    completions: tuple[Content, ...]
    origin: Origin
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    is_ended: bool = False

    @property
    def is_conversational(self) -> bool:
        parts = (self.prompt, *self.completions)
        return any(isinstance(part, list) for part in parts)


@dataclass(frozen=True)
class Branch:
    """Token ids of one completion (or of a whole sequence) and which of them are supervised. Both are 1-D, equal in
    length; `supervised[i]` says that token i is to be predicted from those before it."""

    ids: np.ndarray
    supervised: np.ndarray


@dataclass(frozen=True)
class Tokenized:
    """Token ids of one shared prefix (never supervised) and its branches. A supervised example is one branch."""

    prefix: np.ndarray
    branches: tuple[Branch, ...]
    origin: Origin
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    @property
    def num_supervised(self) -> int:
        """How many tokens have both a prediction and a place in the loss; the first token of a sequence has none."""
        total = sum(int(branch.supervised.sum()) for branch in self.branches)
        if len(self.prefix) == 0:
            total -= sum(int(branch.supervised[:1].sum()) for branch in self.branches)
        return total


Sample = tuple[Tokenized, ...]
"""What `per_device_train_batch_size` counts: one example, or with `packing=True` one pack of examples."""


@dataclass(frozen=True)
class Layout:
    """How sequences lie in a packed batch: segment i is `[starts[i], starts[i] + lengths[i])`. Plain integers, known
    from the data alone, so that no kernel has to ask the device for them.

    A segment with a parent continues it: its tokens see all that the parent's see and then their own, and count
    positions on from there. So a prompt stands once in front of all its answers, and a system prompt in front of all
    prompts. A parent comes before its children; `parents` holds its index, -1 for none, and is empty where nobody has
    one. `made` is what attention makes of it once for all layers of a forward pass."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    parents: tuple[int, ...] = ()
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.starts[-1] + self.lengths[-1] if self.starts else 0

    @property
    def max_length(self) -> int:
        """Of what a token can see, what its segment continues included."""
        return max(self.context_lengths, default=0)

    @property
    def is_shared(self) -> bool:
        return any(parent >= 0 for parent in self.parents)

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """Of each segment, how many tokens its last one sees."""
        if not self.parents:
            return self.lengths
        seen: list[int] = []
        for length, parent in zip(self.lengths, self.parents, strict=True):
            seen.append(length + (seen[parent] if parent >= 0 else 0))
        return tuple(seen)

    @property
    def last_tokens(self) -> tuple[int, ...]:
        """Of each sequence: of the segments that nothing continues."""
        continued = set(self.parents)
        ends = (start + n - 1 for start, n in zip(self.starts, self.lengths, strict=True))
        return tuple(end for index, end in enumerate(ends) if index not in continued)

    def segments(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """The tokens of each segment, and those that it continues, its parent's last."""
        own = [slice(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        before: list[tuple[slice, ...]] = []
        for index, tokens in enumerate(own):
            parent = self.parents[index] if self.parents else -1
            before.append((*before[parent], own[parent]) if parent >= 0 else ())
            yield tokens, before[index]


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end. `sample_S` is the index of each sequence's sample within its optimiser step,
    `origins_S` where it came from; `counts` are the numbers that losses are divided by, per unit. A sequence is a
    segment, or with shared prompts a segment and what it continues. `pairs_P2` are the sequences that are compared: the
    chosen one, the rejected one. `columns` are named by their shape: `ref_logp_R`, `label_S`, `margin_P`. `can_be_cut`:
    smaller batches could be made of it."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    layout: Layout
    rows_R: torch.Tensor
    target_R: torch.Tensor
    sequence_R: torch.Tensor
    sample_S: tuple[int, ...]
    origins_S: tuple[Origin, ...]
    counts: Mapping[str, float]
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pairs_P2: torch.Tensor | None = None
    can_be_cut: bool = False

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    @property
    def sequence_tokens(self) -> int:
        """Tokens of all sequences, a shared prompt counted with each of its answers: what the data hold."""
        parents = set(self.layout.parents)
        return sum(n for index, n in enumerate(self.layout.context_lengths) if index not in parents)

    @property
    def num_sequences(self) -> int:
        return len(self.sample_S)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        if self.input_ids_T.device == device:
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        pairs = None if self.pairs_P2 is None else self.pairs_P2.to(device, non_blocking=True)
        values: dict[str, Any] = {**moved, "columns": columns, "pairs_P2": pairs}
        return replace(self, **values)

    def with_columns(self, **columns: torch.Tensor) -> Batch:
        """The same batch with more columns."""
        return replace(self, columns={**self.columns, **columns})

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("input_ids_T", "position_ids_T", "rows_R", "target_R", "sequence_R")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Needs:
    """What an objective wants of the forward pass beside `logp_R`. `entropy`, `mean_logit` and `log_collision` come
    without gradient, the entropy with one where `entropy_gradient` is asked for; `value`, what a value head says, comes
    with one. With `prompts` the tokens of prompts are rows too."""

    entropy: bool = False
    entropy_gradient: bool = False
    uniform_logp: bool = False
    mean_logit: bool = False
    log_collision: bool = False
    value: bool = False
    prompts: bool = False


@dataclass(frozen=True)
class Outputs:
    """What the model says of a batch's supervised rows, all fp32 of shape `(R,)`: the log-probability of each target,
    whether it was the likeliest token, and where asked the entropy (nats), the mean log-probability over the vocabulary
    (what label smoothing pulls towards), the mean logit, the log of the sum of squared probabilities (of two draws
    being the same), and what the value head expects of the state before the target. A reward model says `score_S` of
    each sequence instead, `(S,)`, and nothing of the rows."""

    logp_R: torch.Tensor
    is_top1_R: torch.Tensor
    entropy_R: torch.Tensor | None = None
    uniform_logp_R: torch.Tensor | None = None
    mean_logit_R: torch.Tensor | None = None
    log_collision_R: torch.Tensor | None = None
    value_R: torch.Tensor | None = None
    score_S: torch.Tensor | None = None

    def per_row(self, batch: Batch) -> torch.Tensor:
        """A number for every row, `(R,)`: its log-probability, or of a reward model the score of its sequence."""
        return self.logp_R if self.score_S is None else self.score_S[batch.sequence_R.to(self.score_S.device)]
