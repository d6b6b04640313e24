"""What pairs and ratings teach beside what they are meant to: length, and contradictions. Said before training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.types import Sample, Tokenized

MIN_PAIRS = 30
"""Fewer say nothing about length."""
SHARE, DEVIATIONS = 0.6, 4.0
"""How many chosen answers must be longer, and by how many standard deviations of chance, before it is said."""


def length_bias(samples: Sequence[Sample]) -> str | None:
    """Where the chosen answers are systematically the longer ones: in how many pairs, and by how much."""
    lengths = np.array([[len(branch.ids) for branch in pair.branches] for (pair,) in samples])
    differs = lengths[lengths[:, 0] != lengths[:, 1]]
    if len(differs) < MIN_PAIRS:
        return None
    longer = int((differs[:, 0] > differs[:, 1]).sum())
    share = longer / len(differs)
    if share < SHARE or longer - len(differs) / 2 < DEVIATIONS * (len(differs) / 4) ** 0.5:
        return None
    ratio = lengths[:, 0].mean() / lengths[:, 1].mean()
    return (
        f"the chosen answer is the longer one in {100 * share:.0f} % of pairs ({ratio:.2g} times the tokens, on "
        "average): a model learns from that to be long"
    )


def contradictions(samples: Sequence[Sample]) -> str | None:
    """Where the same is said to be better and worse: a pair and its reverse, an answer rated good and bad."""
    seen: dict[bytes, tuple[bool, Tokenized]] = {}
    found: list[tuple[Tokenized, Tokenized]] = []
    for (tree,) in samples:
        said, key = _claim(tree)
        before = seen.setdefault(key, (said, tree))
        if before[0] != said:
            found.append((before[1], tree))
    if not found:
        return None
    one, other = found[0]
    return f"{len(found)} rows say the opposite of another (first: {other.origin} of {one.origin})"


def _claim(tree: Tokenized) -> tuple[bool, bytes]:
    """What is judged, however it is written, and which way."""
    prompt = tree.prefix.astype(np.int64).tobytes()
    answers = [branch.ids.astype(np.int64).tobytes() for branch in tree.branches]
    if "label" in tree.columns:
        return bool(tree.columns["label"]), b"|".join([prompt, answers[0]])
    first, second = answers
    return first < second, b"|".join([prompt, *sorted(answers)])
