"""What Alpaca has no place for is named, and flags that say what goes without saying are not in its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.data.change import convert
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError

SYSTEM, USER, ANSWER, AGAIN, LAST = (
    {"role": role, "content": text}
    for role, text in zip(("system", "user", "assistant", "user", "assistant"), ("Be kind.", "Q1", "A1", "Q2", "A2"),
                          strict=True)
)  # fmt: skip
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


@pytest.mark.parametrize(
    "turns",
    [
        [{**SYSTEM, "weight": 0}, {**USER, "weight": 0}, {**ANSWER, "weight": 1}],
        [USER, {**ANSWER, "train": True}],
        [{**USER, "train": False}, {**ANSWER, "train": None}],
        [USER, {**ANSWER, "weight": 0}, AGAIN, {**LAST, "weight": 1}],
    ],
)
def test_flags_that_state_the_default_are_no_obstacle(turns: list[dict[str, Any]], tmp_path: Path) -> None:
    convert([{"messages": turns}], "alpaca", tmp_path / "out.jsonl", DataSettings())
    ((_, row),) = read_rows(tmp_path / "out.jsonl")
    assert row["output"] == turns[-1]["content"]
    assert row.get("history") == ([["Q1", "A1"]] if len(turns) == 4 else None)


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([{**USER, "train": True}, ANSWER], "no place for train flags"),
        ([USER, {**ANSWER, "train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}], "train flags"),
        ([USER, {**ANSWER, "reasoning_content": "hm"}], "no place for thoughts"),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}], "no place for tool calls"),
        ([USER, {**ANSWER, "reasoning_content": "hm", "tool_calls": [CALL]}], "place for thoughts, tool calls"),
        ([{**USER, "name": "Ada"}, ANSWER], "no place for `name`"),
        ([USER, ANSWER, AGAIN, LAST], "1 earlier turn would no longer be trained"),
        ([USER, {**ANSWER, "weight": 1}, AGAIN, {**LAST, "weight": 1}], "1 earlier turn would no longer be trained"),
    ],
)
def test_what_is_in_the_way_is_named(turns: list[dict[str, Any]], what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what) as caught:
        convert([{"messages": turns}], "alpaca", tmp_path / "out.jsonl", DataSettings())
    assert caught.value.code == "E-DATA-0052"
