"""The values that pass between the parts: what a row says, its tokens, a packed batch, and what the model made of it.

Shape suffixes, here and everywhere: `T` packed tokens, `R` supervised rows (one per predicted token), `S` sequences,
`V` vocabulary, `D` hidden size.

A packed batch holds many sequences end to end and no padding. `rows_R` names the hidden states that predict a
supervised token, `target_R` those tokens, `sequence_R` the sequence each belongs to. Objectives see only `Outputs` and
`Batch`, so they cannot tell how the tokens were laid out or cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    from the data alone, so that no kernel has to ask the device for them."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.starts[-1] + self.lengths[-1] if self.starts else 0

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end. `sample_S` is the index of each sequence's sample within its optimiser step,
    `origins_S` where it came from; `counts` are the numbers that losses are divided by, per unit."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    layout: Layout
    rows_R: torch.Tensor
    target_R: torch.Tensor
    sequence_R: torch.Tensor
    sample_S: tuple[int, ...]
    origins_S: tuple[Origin, ...]
    counts: Mapping[str, int]
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    @property
    def num_sequences(self) -> int:
        return len(self.layout.starts)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        if self.input_ids_T.device == device:
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        return Batch(
            layout=self.layout,
            sample_S=self.sample_S,
            origins_S=self.origins_S,
            counts=self.counts,
            columns=columns,
            **moved,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("input_ids_T", "position_ids_T", "rows_R", "target_R", "sequence_R")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Needs:
    """What an objective wants of the forward pass beside `logp_R`. `entropy` comes without gradient."""

    entropy: bool = False
    uniform_logp: bool = False


@dataclass(frozen=True)
class Outputs:
    """What the model says of a batch's supervised rows, all fp32 of shape `(R,)`: the log-probability of each target,
    whether it was the likeliest token, and where asked the entropy (nats) and the mean log-probability over the
    vocabulary (what label smoothing pulls towards)."""

    logp_R: torch.Tensor
    is_top1_R: torch.Tensor
    entropy_R: torch.Tensor | None = None
    uniform_logp_R: torch.Tensor | None = None
