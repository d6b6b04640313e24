"""A preference pair's tokens: the prompt once, then the chosen and the rejected answer.

Each answer is tokenised with the prompt, as a whole. The answers begin where the first of the two parts from the
prompt's own tokens, so that what they share is never trained (and is what TRL takes for the prompt). Flags of the data
say what of an answer is trained, never where it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from posttrain.data.codes import SKIP, bad_row
from posttrain.data.encode import EMPTY, Encoded
from posttrain.data.render import Rendered
from posttrain.errors import DataError
from posttrain.types import Branch, Example, Tokenized


def split(example: Example) -> list[Example]:
    """An example for each completion."""
    return [replace(example, completions=(completion,)) for completion in example.completions]


def join(encoded: list[Encoded], rendered: tuple[Rendered, ...]) -> Tokenized:
    """The answers as branches of what they begin with. Raises DataError where they are the same (E-DATA-0029), or flags
    leave nothing of one (E-DATA-0022)."""
    first = encoded[0].tokenized
    branches = [one.tokenized.branches[0] for one in encoded]
    if _all_alike(branches):
        raise same_answer(rendered[0].example, rendered[0].full)
    shared = min(one.boundary for one in encoded)
    answers = tuple(_behind(shared, one) for one in encoded)
    for answer, text in zip(answers, rendered, strict=True):
        if not answer.supervised.any():
            what = "has an answer of which no token would be trained: its train flags leave all of it out"
            raise bad_row("E-DATA-0022", first.origin, what, row=text.full, hint=f"drop the flags, or the row ({SKIP})")
    return Tokenized(branches[0].ids[:shared], answers, first.origin, first.columns)


def _all_alike(branches: Sequence[Branch]) -> bool:
    return len(branches) > 1 and all(np.array_equal(branch.ids, branches[0].ids) for branch in branches[1:])


def same_answer(example: Example, seen: object) -> DataError:
    hint = f"drop the row ({SKIP}, or posttrain data check --fix): there is nothing to learn from it"
    what = "is the very answer that is chosen"
    return bad_row("E-DATA-0029", example.origin, what, field="rejected", row=seen, hint=hint)


def limit_pair(pair: Tokenized, max_length: int | None, mode: str, max_prompt: int | None = None) -> Tokenized | None:
    """Each answer with its prompt cut to `max_length` tokens. None where a prompt that is kept leaves no room, or where
    what tells the answers apart, or all of one that is trained, is cut off. Where the beginning is cut off, the two no
    longer share theirs. `max_prompt` cuts the beginning of a long prompt off; mode "drop" cuts nothing and leaves long
    pairs out."""
    if max_prompt is not None and len(pair.prefix) > max_prompt:
        pair = replace(pair, prefix=pair.prefix[len(pair.prefix) - max_prompt :])
    if max_length is None or all(len(pair.prefix) + len(b.ids) <= max_length for b in pair.branches):
        return pair
    if mode == "drop":
        return None
    limited = _keep_start(pair, max_length) if mode == "keep_start" else _keep_end(pair, max_length)
    if limited is None or _all_alike(limited.branches) or not all(_is_predicted(limited, b) for b in limited.branches):
        return None
    return limited


def _is_predicted(pair: Tokenized, branch: Branch) -> bool:
    """Whether something is trained that something stands before."""
    return bool(branch.supervised[0 if len(pair.prefix) else 1 :].any())


def _keep_start(pair: Tokenized, max_length: int) -> Tokenized | None:
    room = max_length - len(pair.prefix)
    if room <= 0:
        return None
    return replace(pair, branches=tuple(Branch(b.ids[:room], b.supervised[:room]) for b in pair.branches))


def _keep_end(pair: Tokenized, max_length: int) -> Tokenized:
    none = np.zeros(len(pair.prefix), dtype=bool)
    branches = tuple(
        Branch(np.concatenate([pair.prefix, b.ids])[-max_length:], np.concatenate([none, b.supervised])[-max_length:])
        for b in pair.branches
    )
    return replace(pair, prefix=EMPTY, branches=branches)


def _behind(shared: int, encoded: Encoded) -> Branch:
    """What follows the shared beginning. The tokens from there to this answer's own boundary tell the two apart, and
    are trained."""
    (branch,) = encoded.tokenized.branches
    tells_apart = np.arange(shared, len(branch.ids)) < encoded.boundary
    return Branch(branch.ids[shared:], branch.supervised[shared:] | tells_apart)
