"""Which sequences begin alike, so that what they have in common is computed once: a system prompt, an instruction, the
opening of a template.

Openings in lexicographic order make a tree whose nodes are the beginnings that neighbours have in common. A family has
one node's beginning, in all `(members - 1) x length` tokens fewer; among all choices of families the one is taken that
spares the most. What a subtree spares depends on nothing above it but how long the beginning is that its loose openings
go to, which is that of one of the nodes above. So each node is asked once for each of these, from the leaves upwards,
and says whether it then has a family of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST_TOKENS = 8
"""A shorter beginning is not worth a segment of its own."""
LEAST_SHARE = 0.02
"""Nor is one that spares less than this of its family's tokens."""


@dataclass(frozen=True)
class Beginning:
    """The first `length` tokens of every sequence of the same `family`."""

    family: int
    length: int


def find_beginnings(openings: Sequence[np.ndarray], sizes: Sequence[int]) -> list[Beginning | None]:
    """What each opening, token ids, begins with that others begin with too, perhaps all of it; None where nobody does.
    `sizes` are those of the whole sequences."""
    found: list[Beginning | None] = [None] * len(openings)
    keys = [opening.astype(">u4").tobytes() for opening in openings]
    order = sorted(range(len(openings)), key=lambda i: keys[i])
    for length, places in _families(_tree([openings[i] for i in order])):
        if (len(places) - 1) * length >= LEAST_SHARE * sum(sizes[order[place]] for place in places):
            for place in places:
                found[order[place]] = Beginning(order[places[0]], length)
    return found


@dataclass(eq=False)
class _Node:
    """A beginning of `length` tokens, below `depth` others. `leaves` have no longer one in common with others. `spared`
    is what its tree spares at best for each length that loose openings may go to: those of all nodes above, of which
    the first is 0; `has_family` says for each whether openings stay here."""

    length: int
    depth: int = 0
    leaves: list[int] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    spared: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    has_family: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def weigh(self, lengths: np.ndarray) -> None:
        """All children have been; `lengths` are those of the nodes above and its own."""
        kept = len(self.leaves) * lengths
        for child in self.children:
            kept += child.spared
            del child.spared
        with_family = kept[-1] - self.length
        self.has_family = with_family > kept[:-1]
        self.spared = np.maximum(with_family, kept[:-1])


def _tree(ordered: list[np.ndarray]) -> _Node:
    """Of openings in lexicographic order; the root's length is 0."""
    path = [_Node(0)]
    for place, opening in enumerate(ordered):
        following = ordered[place + 1] if place + 1 < len(ordered) else opening[:0]
        length = _in_common(opening, following)
        leaf: int | None = place
        while path[-1].length > length:
            node = path.pop()
            if leaf is not None:
                node.leaves.append(leaf)
                leaf = None
            if path[-1].length < length:
                path.append(_Node(length))
            path[-1].children.append(node)
        if path[-1].length < length:
            path.append(_Node(length))
        if leaf is not None:
            path[-1].leaves.append(leaf)
    return path[0]


def _weigh(root: _Node) -> None:
    """All nodes, children first."""
    lengths: list[int] = []
    going = [(root, False)]
    while going:
        node, is_ready = going.pop()
        if is_ready:
            node.weigh(np.array(lengths))
            lengths.pop()
            continue
        lengths.append(node.length)
        going.append((node, True))
        for child in node.children:
            child.depth = node.depth + 1
            going.append((child, False))


def _families(root: _Node) -> list[tuple[int, list[int]]]:
    """The lengths of beginnings, and the places of those that have them, in order."""
    _weigh(root)
    members: dict[int, tuple[int, list[int]]] = {}
    going: list[tuple[_Node, int, int]] = [(root, 0, -1)]  # and the depth of that which loose ones go to, and its name
    while going:
        node, depth, to = going.pop()
        if node is not root and node.has_family[depth]:
            depth, to = node.depth, id(node)
            members[to] = (node.length, [])
        if to in members:
            members[to][1].extend(node.leaves)
        going += [(child, depth, to) for child in node.children]
    return [(length, sorted(places)) for length, places in members.values() if len(places) > 1]


def _in_common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens; none if it is hardly any."""
    most = min(len(one), len(other))
    if most < LEAST_TOKENS:
        return 0
    differ = np.flatnonzero(one[:most] != other[:most])
    length = int(differ[0]) if len(differ) else most
    return length if length >= LEAST_TOKENS else 0
