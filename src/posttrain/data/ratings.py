"""Rated answers: a prompt, an answer and its label. A conversation is rated by its last turn, a pair is two ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.codes import bad_row
from posttrain.data.pairs import same_answer
from posttrain.types import Example, Sample, Tokenized


def ratings_of(example: Example) -> list[Example]:
    """One of each answer, with a prompt and a label. Raises DataError (E-DATA-0022, E-DATA-0029)."""
    if len(example.completions) == 2:
        if example.completions[0] == example.completions[1]:
            raise same_answer(example, example.completions[0])
        labelled = zip(example.completions, (True, False), strict=True)
        return [
            replace(example, completions=(completion,), columns={**example.columns, "label": label})
            for completion, label in labelled
        ]
    (whole,) = example.completions
    if example.prompt is not None or not isinstance(whole, list):
        return [example]
    if whole[-1]["role"] != "assistant" or len(whole) < 2:
        what = "does not end with an answer of the assistant, which is what a label rates"
        raise bad_row("E-DATA-0022", example.origin, what, field="messages", row=whole)
    return [replace(example, prompt=whole[:-1], completions=(whole[-1:],))]


def with_mismatched(samples: Sequence[Sample], group_size: int, max_length: int | None) -> list[Sample]:
    """Behind every answer, as a second branch, the one of the sample before it in its group of `group_size` (the first
    has the last one's). What the policy thinks of these, more than the reference, is KTO's estimate of the KL
    divergence (arXiv 2402.01306, section 4.1)."""
    made: list[Sample] = []
    for first in range(0, len(samples), group_size):
        group = [sample[0] for sample in samples[first : first + group_size]]
        made += [(_with_answer_of(tree, group[i - 1], max_length),) for i, tree in enumerate(group)]
    return made


def without_whole_answers(samples: Sequence[Sample]) -> list[Sample]:
    """What only mismatched answers need, left out."""
    return [(replace(tree, columns=_others(tree.columns)),) for (tree,) in samples]


def _others(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if name != "whole_answer"}


def _with_answer_of(tree: Tokenized, other: Tokenized, max_length: int | None) -> Tokenized:
    answer: Any = other.columns["whole_answer"]
    room = None if max_length is None else max_length - len(tree.prefix)
    mismatched = replace(answer, ids=answer.ids[:room], supervised=answer.supervised[:room])
    return replace(tree, branches=(tree.branches[0], mismatched), columns=_others(tree.columns))
