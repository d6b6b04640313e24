"""Samples → micro-batches: sequences end to end, without padding, at most `token_budget` tokens each.

Sequences go longest first into the emptiest of as many micro-batches as are needed. Equal ones need the least memory,
for it is the largest that counts, and take the least time when processes wait for one another; the sum over an
optimiser step does not depend on the cut. If that does not fit, first-fit decreasing, which wastes less space, is used.

A prompt with several answers (a preference pair, a group) stands in front of them once: a segment whose children they
are. Its last token then predicts the first of each.

Shape suffixes: `T` packed tokens, `R` supervised rows, `S` sequences, `P` pairs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from posttrain.types import Batch, Layout, Sample, Tokenized


@dataclass(frozen=True)
class Packing:
    """What an objective asks of its batches. `shared`: a prompt stands in front of its branches once. With `group_size`
    every so many samples are a batch, whatever the token budget: for losses that are no sum over samples. `columns` are
    carried along by name. With `prompts` a prompt's own tokens are predicted too: it is a sequence before its first
    answer's, and `nll_tokens` counts its tokens and those of the first answer."""

    shared: bool = True
    group_size: int | None = None
    columns: tuple[str, ...] = ()
    prompts: bool = False


PLAIN = Packing()


@dataclass(frozen=True)
class _Unit:
    """What must not be parted: a prompt and its branches, and which sample they belong to."""

    tokenized: Tokenized
    sample: int

    @property
    def lengths(self) -> list[int]:
        return [len(self.tokenized.prefix) + len(branch.ids) for branch in self.tokenized.branches]

    def is_shared(self, allowed: bool) -> bool:
        return allowed and len(self.tokenized.prefix) > 0 and len(self.tokenized.branches) > 1

    def size(self, allowed: bool) -> int:
        return self.tokenized.num_tokens if self.is_shared(allowed) else sum(self.lengths)


def plan(samples: Sequence[Sample], token_budget: int, packing: Packing = PLAIN) -> list[Batch]:
    """All sequences of `samples`, each in one batch. One that is longer than the budget has a batch of its own. The
    plan depends on nothing but the arguments; sequences of a batch, and batches, come in the samples' order.

    A prompt with several branches stays together with them.
    """
    shared, group_size = packing.shared, packing.group_size
    units = [_Unit(part, index) for index, sample in enumerate(samples) for part in sample]
    if group_size is not None:
        return [_batch(list(group), packing) for _, group in groupby(units, lambda unit: unit.sample // group_size)]
    groups = _groups([unit.size(shared) for unit in units], token_budget)
    return [_batch([units[i] for i in group], packing) for group in groups]


def _groups(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sums stay within the budget."""
    sizes = [min(length, budget) for length in lengths]
    longest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fitted = _first_fit(sizes, longest_first, budget)
    for num_groups in range(max(1, math.ceil(sum(sizes) / budget)), len(fitted) + 1):
        balanced = _balanced(sizes, longest_first, num_groups)
        if max(sum(sizes[i] for i in group) for group in balanced) <= budget:
            fitted = balanced
            break
    return sorted(sorted(group) for group in fitted if group)


def _balanced(sizes: list[int], order: list[int], num_groups: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    emptiest = [(0, i) for i in range(num_groups)]
    for index in order:
        total, i = heapq.heappop(emptiest)
        groups[i].append(index)
        heapq.heappush(emptiest, (total + sizes[index], i))
    return groups


def _first_fit(sizes: list[int], order: list[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    totals: list[int] = []
    for index in order:
        fit = next((i for i, total in enumerate(totals) if total + sizes[index] <= budget), len(groups))
        if fit == len(groups):
            groups.append([])
            totals.append(0)
        groups[fit].append(index)
        totals[fit] += sizes[index]
    return groups


class _Tape:
    """Segments laid end to end."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.position_starts: list[int] = []
        self.end = 0

    def add(self, *ids: np.ndarray, parent: int = -1) -> int:
        """Its index."""
        length = sum(map(len, ids))
        self.ids += ids
        self.lengths.append(length)
        self.parents.append(parent)
        self.position_starts.append(0 if parent < 0 else self.lengths[parent])
        self.end += length
        return len(self.lengths) - 1

    def starts(self) -> np.ndarray:
        lengths = np.array(self.lengths, dtype=np.int64)
        return np.cumsum(lengths) - lengths

    def layout(self) -> Layout:
        parents = tuple(self.parents) if any(parent >= 0 for parent in self.parents) else ()
        return Layout(tuple(self.starts().tolist()), tuple(self.lengths), parents)

    def positions(self) -> np.ndarray:
        shift = np.array(self.position_starts, dtype=np.int64) - self.starts()
        return np.arange(self.end) + np.repeat(shift, self.lengths)


def _batch(units: list[_Unit], packing: Packing) -> Batch:
    tape = _Tape()
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    sequences: list[tuple[_Unit, int]] = []  # and the number of the branch
    for unit in units:
        prefix, together = unit.tokenized.prefix, unit.is_shared(packing.shared)
        if together:
            last, parent = tape.end + len(prefix) - 1, tape.add(prefix)
        for number, branch in enumerate(unit.tokenized.branches):
            start = tape.end if together else tape.end + len(prefix)  # of the branch
            tokens = np.flatnonzero(branch.supervised)
            if not len(prefix):
                tokens = tokens[tokens > 0]  # nothing comes before a first token that could predict it
            predicting = tokens + start - 1
            if together:
                tape.add(branch.ids, parent=parent)
                predicting[tokens == 0] = last
            else:
                tape.add(prefix, branch.ids)
            if packing.prompts and number == 0:
                beginning = (last + 1 if together else start) - len(prefix)
                rows.append(beginning + np.arange(len(prefix) - 1))
                targets.append(prefix[1:])
                sequences.append((unit, -1))
            rows.append(predicting)
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
