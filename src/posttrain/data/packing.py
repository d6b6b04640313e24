"""Packs of examples: the same ones, in the same order, as TRL's `pack_dataset` makes.

* `bfd`: best fit, longest first; each example stays one sequence, cut at `max_length`. https://arxiv.org/abs/2404.10830
* `bfd_split`: the same, but what is longer than `max_length` goes on as further sequences.
* `wrapped`: all tokens in a row, cut every `max_length`; a pack is one sequence, which attends across its examples.

Packing happens in windows of 1000 examples, so that streams can be packed, and because TRL does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from posttrain.types import Branch, Sample, Tokenized

WINDOW = 1000


def pack(examples: Iterable[Tokenized], max_length: int, strategy: str) -> Iterator[Sample]:
    """The packs of `examples`, each of at most `max_length` tokens."""
    rest = iter(examples)
    while window := list(islice(rest, WINDOW)):
        yield from STRATEGIES[strategy](window, max_length)


def _bfd(window: Sequence[Tokenized], max_length: int) -> list[Sample]:
    return _best_fit([_cut(example, 0, max_length) for example in window], max_length)


def _bfd_split(window: Sequence[Tokenized], max_length: int) -> list[Sample]:
    pieces = [
        _cut(example, start, start + max_length)
        for example in window
        for start in range(0, example.num_tokens, max_length)
    ]
    return _best_fit(pieces, max_length)


def _wrapped(window: Sequence[Tokenized], max_length: int) -> list[Sample]:
    branches = [example.branches[0] for example in window]
    ids = np.concatenate([branch.ids for branch in branches])
    supervised = np.concatenate([branch.supervised for branch in branches])
    ends = np.cumsum([len(branch.ids) for branch in branches])
    packs: list[Sample] = []
    for start in range(0, len(ids), max_length):
        branch = Branch(ids[start : start + max_length], supervised[start : start + max_length])
        origin = window[int(np.searchsorted(ends, start, side="right"))].origin
        packs.append((Tokenized(window[0].prefix, (branch,), origin),))
    return packs


STRATEGIES: dict[str, Callable[[Sequence[Tokenized], int], list[Sample]]] = {
    "bfd": _bfd,
    "bfd_split": _bfd_split,
    "wrapped": _wrapped,
}


def _best_fit(pieces: Sequence[Tokenized], max_length: int) -> list[Sample]:
    """Each piece, longest first, into the pack with the least space that still takes it; of equals, into the one that
    has had this much space for longest."""
    packs: list[list[Tokenized]] = []
    by_space: dict[int, deque[list[Tokenized]]] = {}
    spaces: list[int] = []  # the keys of by_space, ascending
    for piece in sorted((piece for piece in pieces if piece.num_tokens), key=lambda piece: -piece.num_tokens):
        fit = bisect_left(spaces, piece.num_tokens)
        if fit < len(spaces):
            space = spaces[fit]
            pack = by_space[space].popleft()
            if not by_space[space]:
                del by_space[space], spaces[fit]
        else:
            space, pack = max_length, []
            packs.append(pack)
        pack.append(piece)
        left = space - piece.num_tokens
        if left and left not in by_space:
            insort(spaces, left)
        if left:
            by_space.setdefault(left, deque()).append(pack)
    return [tuple(pack) for pack in packs]


def _cut(example: Tokenized, start: int, stop: int) -> Tokenized:
    branch = example.branches[0]
    if start == 0 and stop >= len(branch.ids):
        return example
    piece = Branch(branch.ids[start:stop], branch.supervised[start:stop])
    return Tokenized(example.prefix, (piece,), example.origin, example.columns)
