"""What stands beside what is read of a row, in messages and in columns: refused, or named where it looks meant."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.columns import read_columns
from posttrain.data.doctor.check import check
from posttrain.data.formats import all_formats, detect
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.view.pairs import any_view
from posttrain.errors import DataError
from posttrain.types import Example, Origin
from tests.doctor_files import codes, finding
from tests.tiny_tokenizers import chatml_tokenizer

ORIGIN = Origin("train.jsonl", 16, 17)
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALLED = {"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}


def parse(row: dict[str, Any]) -> Example:
    row = read_columns(row, {}, ORIGIN)
    return detect(row, ORIGIN, all_formats()).parse(row, ORIGIN)


def error(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row)
    return caught.value


@pytest.mark.parametrize(
    ("key", "value"), [("content", "Other words"), ("role", "assistant"), ("role", "function_call")]
)
def test_sharegpt_that_says_two_things(key: str, value: str) -> None:
    turns = [{"from": "human", "value": "Hi", key: value}, {"from": "gpt", "value": "Hello"}]
    found = error({"conversations": turns})
    assert found.code == "E-DATA-0011"
    beside = {"content": "value", "role": "from"}[key]
    assert f'"conversations[0].{key}" stands beside `{beside}`, which says something else' in found.message
    same = {"from": "human", "value": "Hi", "role": "user", "content": "Hi"}
    assert parse({"conversations": [same, {**turns[1], "content": None}]}).completions == ([USER, ANSWER],)


@pytest.mark.parametrize("key", ["images", "context", "refusal", "documents", "text", "value"])
def test_words_beside_the_content(key: str) -> None:
    rows = [{"messages": [USER, {**ANSWER, key: ["a.png"] if key == "images" else "More words"}]}]
    about = finding(check(rows), "W-DATA-0131")
    assert f"`messages[].{key}`" in about.sentence
    assert f"have `messages[].{key}`" in "".join(prepare(rows, chatml_tokenizer(), DataSettings()).report.notes())
    assert codes([{"messages": [USER, {**ANSWER, key: "Hello" if key in ("text", "value") else ""}]}]) == []


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "Hi", "train_on_input": True}, "train_on_input"),
        ({"instruction": "Hi", "output": "Hello", "is_train": 0}, "is_train"),
        ({"text": "Hi", "query": "Why?"}, "query"),
        ({"text": "Hi", "Prompt": "Why?"}, "Prompt"),
        ({"text": "Hi", "split": "validation"}, "split: validation"),
        ({"messages": [USER, ANSWER], "split": " Test"}, "split: Test"),
        ({"text": "Hi", "conversations": ["Hi", "Hello"]}, "conversations"),
        ({"text": "Hi", "dialog": ["Hi", "Hello"]}, "dialog"),
        ({"input_ids": [5, 6, 7], "prompt_mask": [1, 1, 0]}, "prompt_mask"),
        ({"input_ids": [5, 6, 7], "loss_weights": [0, 0, 1]}, "loss_weights"),
    ],
)
def test_columns_that_look_meant(row: dict[str, Any], name: str) -> None:
    assert f"(`{name}` 1)" in finding(check([row]), "W-DATA-0131").sentence
    assert f"have `{name}`" in "".join(prepare([row], chatml_tokenizer(), DataSettings()).report.notes())


def test_columns_of_the_users_own() -> None:
    for row in ({"text": "Hi", "loss": 2.3}, {"text": "Hi", "train_loss": 0.5}, {"text": "Hi", "query": "Hi"},
                {"text": "Hi", "split": "train"}, {"text": "Hi", "split": 3}, {"text": "Hi", "dialog": "x"},
                {"input_ids": [5, 6, 7], "special_tokens_mask": [0, 0, 0]}):  # fmt: skip
        assert codes([row]) == []


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"begin_offset": 0, "end_offset": 2, "train": False}, "begin_offset"),
        ({"content": [{"type": "text", "text": "Hello", "train_detail": [[0, 1, False]]}]}, "content[0].train_detail"),
        ({"content": [{"type": "text", "text": "Hello", "end_offset": 3}]}, "content[0].end_offset"),
        ({"tool_calls": [{**CALLED, "train": False}]}, "tool_calls[0].train"),
        ({"tool_calls": [{**CALLED, "weight": 0}]}, "tool_calls[0].weight"),
    ],
)
def test_flags_where_they_say_nothing(answer: dict[str, Any], field: str) -> None:
    found = error({"messages": [USER, {**ANSWER, **answer}]})
    assert found.code == "E-DATA-0042"
    assert f'"messages[1].{field}" stands where it says nothing' in found.message
    assert "give it to the message" in (found.hint or "")


def test_pairs_whose_scores_say_the_opposite() -> None:
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 9}
    about = finding(check([row, {**row, "prompt": "Ho", "score_chosen": 9.0}]), "W-DATA-0131")
    assert (about.count, "(`score_chosen below score_rejected` 1)" in about.sentence) == (1, True)
    assert "swap or drop such pairs" in about.details["shown"][0]


def test_a_conversation_is_rated_by_its_last_turn() -> None:
    again, tokenizer = {"role": "assistant", "content": "Two"}, chatml_tokenizer()
    row = {"messages": [USER, ANSWER, USER, again], "label": True}
    branch = prepare([row], tokenizer, DataSettings(method="rated")).samples[0][0].branches[0]
    view: Any = any_view(row, tokenizer)
    assert "".join(piece.text for piece in view.pieces if piece.trained) == "Two<|im_end|>\n"
    assert check([row], tokenizer=tokenizer).lengths.supervised == int(branch.supervised.sum())
    for broken in ({**row, "messages": [USER, ANSWER, USER]}, {**row, "messages": [ANSWER]}):
        assert codes([broken]) == ["E-DATA-0022"]
        assert any_view(broken, tokenizer).error.code == "E-DATA-0022"  # type: ignore[union-attr]
