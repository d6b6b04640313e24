"""Rows that come as token ids: every mask heeded, refused, or named."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.doctor.check import check
from posttrain.data.prepare import Prepared, prepare
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from tests.doctor_files import codes
from tests.tiny_tokenizers import plain_tokenizer

IDS = [5, 6, 7, 8]


def run(row: dict[str, Any], **settings: Any) -> Prepared:
    return prepare([{"input_ids": IDS, **row}], plain_tokenizer(), DataSettings(**settings))


def tokens(row: dict[str, Any], **settings: Any) -> tuple[list[int], list[int]]:
    branch = run(row, **settings).samples[0][0].branches[0]
    return branch.ids.tolist(), branch.supervised.astype(int).tolist()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, (IDS, [1, 1, 1, 1])),
        ({"attention_mask": [1, 1, 1, 1]}, (IDS, [1, 1, 1, 1])),
        ({"attention_mask": [0, 1, 1, 0]}, ([6, 7], [1, 1])),
        ({"attention_mask": [1, 1, 1, 0], "labels": [-100, 6, -100, -100]}, ([5, 6, 7], [0, 1, 0])),
        ({"loss_mask": [0, 0, 1, 1]}, (IDS, [0, 0, 1, 1])),
        ({"loss_mask": [False, True, True, False]}, (IDS, [0, 1, 1, 0])),
        ({"loss_mask": [0, 0, 1, 1], "labels": [-100, 6, 7, -100]}, (IDS, [0, 0, 1, 0])),
        ({"assistant_masks": [0, 1, 1, 0], "loss_mask": [1, 1, 0, 1]}, (IDS, [0, 1, 0, 0])),
        ({"completion_mask": [0, 0, 0, 1]}, (IDS, [1, 1, 1, 1])),
    ],
)
def test_masks(row: dict[str, Any], expected: tuple[list[int], list[int]]) -> None:
    assert tokens(row) == expected


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": [1, 0, 1, 1]}, r'"attention_mask\[1\]" is 0 between tokens'),
    ({"attention_mask": [0, 0, 0, 0]}, '"attention_mask" is 0 everywhere'),
    ({"attention_mask": [1, 1, 1, 2]}, r'"attention_mask\[3\]" is 2, neither 0 nor 1'),
    ({"loss_mask": [0, 1, -1, 1]}, r'"loss_mask\[2\]" is -1, neither 0 nor 1'),
    ({"loss_mask": [0, 1, 0.5, 1]}, '"loss_mask" is not a list of integers'),
    ({"loss_mask": [0, 1]}, '"loss_mask" has 2 elements, `input_ids` 4'),
    ({"completion_mask": [0, 1, 3, 1]}, r'"completion_mask\[2\]" is 3'),
    ({"assistant_masks": [0, 1, 9, 1]}, r'"assistant_masks\[2\]" is 9'),
    ({"input_ids": [True, False, True]}, '"input_ids" is not a list of integers'),
    ({"input_ids": [1, True, 3]}, '"input_ids" is not a list of integers'),
    ({"labels": [True, 6, 7, 8]}, '"labels" is not a list of integers'),
    ({"input_ids": [-3, 6]}, '"input_ids" holds -3'),
    ({"input_ids": "5 6"}, '"input_ids" is not a list of integers'),
]


@pytest.mark.parametrize(("row", "says"), BROKEN)
def test_what_is_no_mask_is_refused_in_training_and_by_the_check(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        run(row)
    assert caught.value.code == "E-DATA-0025"
    assert codes([{"input_ids": IDS, **row}]) == ["E-DATA-0025"]


def test_masks_that_leave_nothing_are_refused_by_both() -> None:
    row = {"labels": [-100] * 4}
    with pytest.raises(DataError, match="no token of the row would be trained"):
        run(row)
    assert codes([{"input_ids": IDS, **row}]) == ["E-DATA-0022"]


def test_a_mask_that_is_not_heeded_is_named() -> None:
    row = {"completion_mask": [0, 0, 1, 1]}
    assert "have `completion_mask`, which their format has no place for" in "\n".join(run(row).report.notes())
    assert run(row, completion_only=True).report.no_place == {}
    assert "completion_only_loss=True heeds it" in check([{"input_ids": IDS, **row}]).findings[0].details["shown"][0]
    assert list(run({"labels": IDS, "assistant_masks": [0, 1, 1, 1]}).report.no_place) == ["assistant_masks"]
