"""Samples → micro-batches: sequences end to end, without padding, at most `token_budget` tokens each. Which come
together is for grouping.py to say; the sum over an optimiser step does not depend on it.

A prompt with several answers (a preference pair, a group) stands in front of them once: a segment whose children they
are. Its last token then predicts the first of each. What prompts and single sequences of a micro-batch begin with alike
(beginnings.py) stands once in front of these.

Shape suffixes: `T` packed tokens, `R` supervised rows, `S` sequences, `P` pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from posttrain.data.beginnings import Beginning, find_beginnings
from posttrain.data.grouping import Piece, group
from posttrain.types import Batch, Layout, Sample, Tokenized

REPEATS = 4
"""Attention without a kernel of our own copies the keys of a beginning for each that sees it."""
REPEATS_WITH_KERNELS = 8
"""With one, the gradients of a beginning have a place for each prompt that continues it."""


@dataclass(frozen=True)
class Packing:
    """What an objective asks of its batches. `shared`: a prompt stands in front of its branches once; `beginnings`:
    and what prompts and single sequences begin with alike, in front of these. With `group_size` every so many samples
    are a batch, whatever the token budget: for losses that are no sum over samples. `columns` are carried along by
    name. With `prompts` a prompt's own tokens are predicted too: it is a sequence before its first answer's, and
    `nll_tokens` counts its tokens and those of the first answer. `repeats`: so many budgets would the beginnings of a
    micro-batch be at most, were they repeated."""

    shared: bool = True
    beginnings: bool = False
    repeats: float = REPEATS
    group_size: int | None = None
    columns: tuple[str, ...] = ()
    prompts: bool = False


PLAIN = Packing()


@dataclass(frozen=True)
class _Unit:
    """What must not be parted: a prompt and its branches, and which sample they belong to. `beginning` is what others
    begin with as well."""

    tokenized: Tokenized
    sample: int
    beginning: Beginning | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(self.tokenized.prefix) + len(branch.ids) for branch in self.tokenized.branches]

    def is_shared(self, allowed: bool) -> bool:
        return allowed and len(self.tokenized.prefix) > 0 and len(self.tokenized.branches) > 1

    def first(self, allowed: bool) -> np.ndarray | None:
        """What stands behind a beginning, and that included: the prompt that stands in front of several branches, or
        all of a single sequence. Several sequences have none."""
        prefix, branches = self.tokenized.prefix, self.tokenized.branches
        if self.is_shared(allowed):
            return prefix
        return np.concatenate([prefix, branches[0].ids]) if len(branches) == 1 else None

    def opening(self, packing: Packing) -> np.ndarray:
        """What of it may have a beginning in common with others: nothing that is predicted, for its rows would be there
        as often as before, and not the last token."""
        first = self.first(packing.shared)
        if first is None or packing.prompts:
            return self.tokenized.prefix[:0]
        if self.is_shared(packing.shared):
            return first[:-1]
        supervised = np.flatnonzero(self.tokenized.branches[0].supervised)
        end = len(self.tokenized.prefix) + int(supervised[0]) if len(supervised) else len(first)
        return first[: min(end, len(first) - 1)]

    def num_segments(self, allowed: bool) -> int:
        return len(self.tokenized.branches) + self.is_shared(allowed)

    def size(self, allowed: bool) -> int:
        return self.tokenized.num_tokens if self.is_shared(allowed) else sum(self.lengths)


def plan(samples: Sequence[Sample], token_budget: int, packing: Packing = PLAIN) -> list[Batch]:
    """All sequences of `samples`, each in one batch. One that is longer than the budget has a batch of its own. The
    plan depends on nothing but the arguments; sequences of a batch, and batches, come in the samples' order.

    A prompt with several branches stays together with them.
    """
    units = [_Unit(part, index) for index, sample in enumerate(samples) for part in sample]
    if packing.beginnings:
        units = _with_beginnings(units, packing)
    if (size := packing.group_size) is not None:
        return [_batch(list(whole), packing) for _, whole in groupby(units, lambda unit: unit.sample // size)]
    pieces = [Piece(unit.size(packing.shared), unit.beginning, unit.num_segments(packing.shared)) for unit in units]
    groups = group(pieces, token_budget, packing.repeats)
    return [_batch([units[i] for i in one], packing) for one in groups]


def _with_beginnings(units: list[_Unit], packing: Packing) -> list[_Unit]:
    found = find_beginnings([unit.opening(packing) for unit in units], [unit.size(packing.shared) for unit in units])
    return [replace(unit, beginning=beginning) for unit, beginning in zip(units, found, strict=True)]


class _Tape:
    """Segments laid end to end."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.begins: list[int] = []
        self.position_starts: list[int] = []
        self.end = 0

    def add(self, *ids: np.ndarray, parent: int = -1) -> int:
        """Its index."""
        length = sum(map(len, ids))
        self.ids += ids
        self.begins.append(self.end)
        self.lengths.append(length)
        self.parents.append(parent)
        self.position_starts.append(0 if parent < 0 else self.position_starts[parent] + self.lengths[parent])
        self.end += length
        return len(self.lengths) - 1

    def places(self, segment: int) -> np.ndarray:
        """Where the tokens of a sequence stand that ends with this segment: those that it continues and its own."""
        own = np.arange(self.begins[segment], self.begins[segment] + self.lengths[segment])
        parent = self.parents[segment]
        return own if parent < 0 else np.concatenate([self.places(parent), own])

    def layout(self) -> Layout:
        parents = tuple(self.parents) if any(parent >= 0 for parent in self.parents) else ()
        return Layout(tuple(self.begins), tuple(self.lengths), parents)

    def positions(self) -> np.ndarray:
        shift = np.array(self.position_starts, dtype=np.int64) - np.array(self.begins, dtype=np.int64)
        return np.arange(self.end) + np.repeat(shift, self.lengths)


def _batch(units: list[_Unit], packing: Packing) -> Batch:
    tape = _Tape()
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    sequences: list[tuple[_Unit, int]] = []  # and the number of the branch
    for unit, segments in zip(units, _laid_out(units, packing.shared, tape), strict=True):
        prefix = unit.tokenized.prefix
        for number, (branch, segment) in enumerate(zip(unit.tokenized.branches, segments, strict=True)):
            places = tape.places(segment)
            tokens = np.flatnonzero(branch.supervised)
            if not len(prefix):
                tokens = tokens[tokens > 0]  # nothing comes before a first token that could predict it
            if packing.prompts and number == 0:
                rows.append(places[: max(len(prefix) - 1, 0)])
                targets.append(prefix[1:])
                sequences.append((unit, -1))
            rows.append(places[len(prefix) + tokens - 1])
            targets.append(branch.ids[tokens])
            sequences.append((unit, number))
    counts = [len(part) for part in rows]
    pairs = [i for i, (unit, number) in enumerate(sequences) if len(unit.tokenized.branches) == 2 and number == 0]
    return Batch(
        input_ids_T=_tensor(np.concatenate(tape.ids)),
        position_ids_T=_tensor(tape.positions()),
        layout=tape.layout(),
        rows_R=_tensor(np.concatenate(rows)),
        target_R=_tensor(np.concatenate(targets)),
        sequence_R=_tensor(np.repeat(np.arange(len(sequences)), counts)),
        sample_S=tuple(unit.sample for unit, _ in sequences),
        origins_S=tuple(unit.tokenized.origin for unit, _ in sequences),
        counts={
            "tokens": sum(counts),
            "sequences": len(sequences),
            **(_of_pairs(pairs, counts) if pairs else {}),
            **(_of_labels(sequences, counts) if "label" in packing.columns else {}),
            **({"nll_tokens": _until_first(sequences, counts)} if packing.prompts else {}),
            **({"batches": 1} if packing.group_size else {}),
        },
        columns=_columns(units, packing.columns),
        can_be_cut=len(units) > 1 and packing.group_size is None,
        pairs_P2=torch.tensor([(i, i + 1) for i in pairs]) if pairs else None,
    )


def _laid_out(units: list[_Unit], shared: bool, tape: _Tape) -> list[list[int]]:
    """Onto the tape; the segments that the branches of each unit end with."""
    members = Counter(unit.beginning.family for unit in units if unit.beginning)
    parents: dict[int, int] = {}
    segments = []
    for unit in units:
        prefix, branches, beginning = unit.tokenized.prefix, unit.tokenized.branches, unit.beginning
        parent, own = -1, unit.first(shared)
        if own is not None and beginning is not None and members[beginning.family] > 1:
            if beginning.family not in parents:
                parents[beginning.family] = tape.add(own[: beginning.length])
            parent, own = parents[beginning.family], own[beginning.length :]
        if own is None:
            segments.append([tape.add(prefix, branch.ids) for branch in branches])
            continue
        segment = tape.add(own, parent=parent)
        shares = unit.is_shared(shared)
        segments.append([tape.add(branch.ids, parent=segment) for branch in branches] if shares else [segment])
    return segments


def _of_pairs(first: list[int], tokens: list[int]) -> dict[str, int]:
    """`first` is the number of each pair's chosen sequence; the rejected one comes next."""
    chosen, rejected = (sum(tokens[i + side] for i in first) for side in (0, 1))
    return {"pairs": len(first), "chosen_tokens": chosen, "rejected_tokens": rejected}


def _of_labels(sequences: list[tuple[_Unit, int]], tokens: list[int]) -> dict[str, int]:
    """How many answers are desirable and not, and their tokens; what stands behind an answer is not rated."""
    counts = {"desirable": 0, "undesirable": 0, "desirable_tokens": 0, "undesirable_tokens": 0}
    for (unit, number), length in zip(sequences, tokens, strict=True):
        if number == 0:
            name = "desirable" if unit.tokenized.columns["label"] else "undesirable"
            counts[name] += 1
            counts[f"{name}_tokens"] += length
    return counts


def _until_first(sequences: list[tuple[_Unit, int]], tokens: list[int]) -> int:
    return sum(length for (_, number), length in zip(sequences, tokens, strict=True) if number <= 0)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


COLUMNS = {
    "label": ("label_S", torch.bool),
    "margin": ("margin_P", torch.float32),
    "advantage": ("advantage_S", torch.float32),
}
"""What an example may carry for its objective: its name there, and in a batch."""
ABSENT = {"margin": 0.0}
"""What an example has that carries none."""
OF_TOKENS = {
    "sampled_logp": "sampled_logp_R",
    "old_logp": "old_logp_R",
    "ref_logp": "ref_logp_R",
    "old_value": "old_value_R",
    "advantages": "advantage_R",
    "returns": "return_R",
}
"""What it may carry of every supervised token: an array a branch."""


def _columns(units: list[_Unit], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    columns = {}
    for name in names:
        values = [_carried(unit.tokenized, name) for unit in units]
        if name in OF_TOKENS:
            parts = [part for branches in values for part in branches]
            columns[OF_TOKENS[name]] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        elif name == "advantage":  # each branch has one
            columns["advantage_S"] = torch.tensor([one for branches in values for one in branches])
        else:
            column, dtype = COLUMNS[name]
            if column.endswith("_S"):
                of_each = zip(values, units, strict=True)
                values = [value for value, unit in of_each for _ in unit.tokenized.branches]
            columns[column] = torch.tensor(values, dtype=dtype)
    return columns


def _carried(part: Tokenized, name: str) -> Any:
    return part.columns[name] if name in part.columns or name not in ABSENT else ABSENT[name]
