"""Flags of the data in pairs and ratings: they say what of an answer is trained, and never change what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from posttrain.data.encode import EMPTY, Encoded
from posttrain.data.pairs import join
from posttrain.data.prepare import prepare
from posttrain.data.ratings import with_mismatched
from posttrain.data.render import Rendered
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.types import Branch, Example, Origin, Sample, Tokenized
from tests.tiny_tokenizers import chatml_tokenizer

QUESTION = {"role": "user", "content": "why?"}
AGAIN = {"role": "user", "content": "sure?"}
OPEN, END = "<|im_start|>", "<|im_end|>\n"
WORDS = chatml_tokenizer()


def says(text: str, **flags: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **flags}


def details(*trained: tuple[int, int, bool]) -> dict[str, Any]:
    return {
        "train_detail": [{"begin_offset": begin, "end_offset": end, "train": train} for begin, end, train in trained]
    }


def samples(rows: list[dict[str, Any]], method: str = "preference", **settings: Any) -> list[Sample]:
    columns = ("label",) if method == "rated" else ()
    return list(
        prepare(rows, WORDS, DataSettings(method=method, completion_only=True, columns=columns, **settings)).samples
    )


def pair(chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
    return {"prompt": [QUESTION], "chosen": chosen, "rejected": rejected}


def whole(tree: Tokenized, branch: Branch) -> str:
    return str(WORDS.decode(np.concatenate([tree.prefix, branch.ids])))


def trained(branch: Branch) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], branch.supervised.astype(int), [0]])))
    return [WORDS.decode(branch.ids[start:end]) for start, end in edges.reshape(-1, 2)]


SURE, NOPE = "Sure! good", "Nope! bad"
LATER = f"{OPEN}user\nsure?{END}{OPEN}assistant\n"
CASES: dict[str, tuple[list[Any], list[Any], list[str], list[str]]] = {
    "the same part of both": (
        [says(SURE, **details((0, 4, False), (5, 9, True)))], [says(NOPE, **details((0, 4, False), (5, 8, True)))],
        [" good" + END], [" bad" + END],
    ),
    "a part of the chosen one": (
        [says(SURE, **details((0, 4, False), (5, 9, True)))], [says(NOPE)], [" good" + END], [NOPE + END],
    ),
    "a part of the rejected one": (
        [says(SURE)], [says(NOPE, **details((0, 4, False), (5, 8, True)))], [SURE + END], [" bad" + END],
    ),
    "first turns": (
        [says("AAA one", train=False), AGAIN, says("good")], [says("BBB two", weight=0), AGAIN, says("bad")],
        [LATER + "good" + END], [LATER + "bad" + END],  # what follows the prompt is trained, as in TRL
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_flags_leave_tokens_out_and_change_none(case: str) -> None:
    chosen, rejected, *expected = CASES[case]
    ((tree,),) = samples([pair(chosen, rejected)])
    without = [[{"role": one["role"], "content": one["content"]} for one in side] for side in (chosen, rejected)]
    ((bare,),) = samples([pair(*without)])
    for mine, plain in zip(tree.branches, bare.branches, strict=True):
        assert whole(tree, mine) == whole(bare, plain)
    for branch, texts in zip(tree.branches, expected, strict=True):
        assert [text.strip() for text in trained(branch) if text.strip()] == [text.strip() for text in texts]


@pytest.mark.parametrize("empty", [0, 1])
def test_an_answer_of_which_nothing_is_left(empty: int) -> None:
    """As a template without an end of turn may have it."""
    origin = Origin("here", 3)
    masks = [np.array([False, False, place != empty]) for place in range(2)]
    encoded = [
        Encoded(Tokenized(EMPTY, (Branch(np.array([1, 2, 3 + place], dtype=np.int32), mask),), origin), False, 0, 2)
        for place, mask in enumerate(masks)
    ]
    rendered = tuple(Rendered(Example([QUESTION], (text,), origin), text) for text in (SURE, NOPE))
    with pytest.raises(DataError, match="no token would be trained") as caught:
        join(encoded, rendered)
    assert caught.value.code == "E-DATA-0022"


def test_what_is_cut_off_may_be_all_that_is_trained() -> None:
    """A long beginning that is not trained, and `max_length` that ends within it."""
    beginning = "very " * 30
    row = pair([says(beginning + "good", **details((0, 149, False)))], [says(NOPE)])
    ((tree,), *_) = samples([row, pair([says(SURE)], [says(NOPE)])], max_length=40)
    assert whole(tree, tree.branches[0]).endswith(SURE + END)


def test_ratings_keep_their_beginning_behind_another_prompt() -> None:
    """KTO's mismatched answer is the whole one."""
    rows = [
        {"prompt": [QUESTION], "completion": [says(SURE, **details((0, 4, False), (5, 9, True)))], "label": True},
        {"prompt": [AGAIN], "completion": [says(NOPE)], "label": False},
    ]
    found = with_mismatched(samples(rows, "rated"), 2, None)
    ((_, of_first), (_, of_second)) = (sample[0].branches for sample in found)
    assert WORDS.decode(of_second.ids) == SURE + END
    assert WORDS.decode(of_first.ids) == NOPE + END
    assert [text.strip() for text in trained(of_second)] == [("good" + END).strip()]
