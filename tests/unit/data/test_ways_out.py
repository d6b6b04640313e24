"""No complaint about a row is without a way out, in whatever verb it is made."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.change import convert
from posttrain.data.change.reading import Reading, Skipped
from posttrain.data.codes import bad_row
from posttrain.data.doctor.check import check
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.types import Origin
from tests.doctor_files import finding, row
from tests.tiny_tokenizers import chatml_tokenizer

USER, ANSWER = row("Hi", "Hello")["messages"]
UNTRAINED = {**ANSWER, "train": False}


def calling(**call: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": call}]}]}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing": ({"instruction": "a", "output": None}, "E-DATA-0011", "fill it or drop the row"),
    "a number": ({"instruction": "a", "output": 3}, "E-DATA-0011", "write it as text"),
    "a number in a message": ({"messages": [{**USER, "content": 5}, ANSWER]}, "E-DATA-0011", "write it as text"),
    "an input of numbers": ({"instruction": "a", "input": 3, "output": "b"}, "E-DATA-0011", "write it as text"),
    "no pairs": ({"instruction": "a", "history": ["b"], "output": "c"}, "E-DATA-0011", "earlier turns are pairs"),
    "an empty prompt": ({"prompt": [], "completion": [ANSWER]}, "E-DATA-0011", "fill it or drop the row"),
    "no messages": ({"prompt": [5], "completion": [ANSWER]}, "E-DATA-0011", "a message is"),
    "no list": ({"messages": '{"role": "user"}'}, "E-DATA-0011", "write a list"),
    "no arguments": ({**row("a", "b"), "chat_template_kwargs": ["x"]}, "E-DATA-0011", "name them"),
    "a role of numbers": ({"messages": [{**USER, "role": 5}, ANSWER]}, "E-DATA-0012", "roles: system"),
    "broken arguments": (calling(name="f", arguments="{bad"), "E-DATA-0015", "write it with json.dumps"),
    "broken tools": ({**row("a", "b"), "tools": "[{bad"}, "E-DATA-0015", "write it with json.dumps"),
    "no call": (calling(arguments="{}"), "E-DATA-0015", "a call is"),
    "no list of calls": ({"messages": [USER, {"role": "assistant", "tool_calls": {"a": 1}}]}, "E-DATA-0015", "a call"),
    "half a character": (row("Hi", "a\ud800b"), "E-DATA-0024", "cut within a character"),
}


@pytest.mark.parametrize("name", BAD)
def test_every_verb_says_the_way_out(name: str, tmp_path: Any) -> None:
    bad, code, way = BAD[name]
    rows = [row("a", "b"), bad]
    with pytest.raises(DataError) as training:
        prepare(rows, chatml_tokenizer(), DataSettings(assistant_only=None))
    left_out = Skipped()
    convert(rows, "messages", tmp_path / "out.jsonl", DataSettings(on_bad_row="skip"), skipped=left_out)
    (listed,) = left_out
    assert (training.value.code, listed["code"]) == (code, code)
    assert way in (training.value.hint or "")
    assert way in (listed["hint"] or "")
    assert way in finding(check(rows), code).fix


def test_no_complaint_is_without_one() -> None:
    assert "drop the row (on_bad_row=skip" in (bad_row("E-DATA-0011", Origin("a", 0), "is odd").hint or "")


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"messages": [USER, UNTRAINED]}, ""),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, ""),
        ({"prompt": [USER], "completion": [UNTRAINED]}, '"completion" '),
        ({"messages": [USER, UNTRAINED, USER, UNTRAINED]}, ""),
    ],
)
def test_a_flag_that_leaves_nothing_to_train_is_named(bad: dict[str, Any], field: str) -> None:
    for read in (
        lambda: prepare([bad], chatml_tokenizer(), DataSettings(assistant_only=None)),
        lambda: list(Reading([bad], DataSettings()).said()),
    ):
        with pytest.raises(DataError) as caught:
            read()
        assert caught.value.code == "E-DATA-0022"
        assert f"{field}" in caught.value.message
        assert '"train"' in caught.value.message
        assert "take this flag out" in (caught.value.hint or "")
        assert "add the answer" not in (caught.value.hint or "")
    with pytest.raises(DataError, match="add the answer"):
        list(Reading([{"messages": [USER]}], DataSettings()).said())
