"""Preference pairs and rated answers: read by whoever wants them, refused by supervised training."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.doctor.check import check
from posttrain.data.formats import all_formats, choose, detect, formats
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Origin
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

ORIGIN = Origin("train.jsonl", 16, 17)
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "Go")))
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}


def parse(row: dict[str, Any]) -> Example:
    return detect(row, ORIGIN, all_formats()).parse(row, ORIGIN)


def error(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row)
    return caught.value


PAIRS: list[tuple[dict[str, Any], Any, Any, Any]] = [
    ({"prompt": "1+1", "chosen": "2", "rejected": "3"}, "1+1", "2", "3"),
    ({"prompt": "", "chosen": "2", "rejected": "3"}, "", "2", "3"),
    ({"chosen": "Q: 1+1 A: 2", "rejected": "Q: 1+1 A: 3"}, "Q: 1+1 A:", " 2", " 3"),  # where TRL parts them
    ({"chosen": "good", "rejected": "bad"}, None, "good", "bad"),
    ({"chosen": "same words", "rejected": "same words"}, "same word", "s", "s"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], [GOOD], [BAD]),
    ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, [USER], [GOOD], [BAD]),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, [USER], [GOOD], [GOOD]),
    ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
    ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, [USER], [GOOD], [BAD]),
    ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "Go"}}, [USER], [GOOD], [BAD]),
    ({"conversations": [HUMAN], "chosen": "Hello", "rejected": "Go"}, [USER], [GOOD], [BAD]),
    ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, [USER], [GOOD], [BAD]),
]


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), PAIRS)
def test_pairs(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    example = parse({**row, "id": 3})
    assert (example.prompt, example.completions) == (prompt, (chosen, rejected))
    assert example.columns == {"id": 3}


def test_a_ranking_keeps_system_and_tools() -> None:
    row = {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT, "system": "Be kind.", "tools": '[{"name": "f"}]'}
    example = parse(row)
    assert example.prompt == [{"role": "system", "content": "Be kind."}, USER]
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]
    assert example.columns == {}


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": " "}, "E-DATA-0013", '"rejected" is empty'),
        ({"prompt": "x", "chosen": "a", "rejected": 3}, "E-DATA-0016", "is text but `rejected` is a number"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "E-DATA-0016", "is a list but `chosen` is text"),
        ({"prompt": "else", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "E-DATA-0016", "begin with"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "E-DATA-0016", "there is no prompt"),
        ({"prompt": [USER], "chosen": [{**GOOD, "content": ""}], "rejected": [BAD]}, "E-DATA-0013", "empty"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "E-DATA-0011", "is an empty list"),
        ({"conversations": [HUMAN], "chosen": {"from": "gpt"}, "rejected": GPT}, "E-DATA-0011", "lacks"),
        ({"conversations": [HUMAN], "chosen": 3, "rejected": GPT}, "E-DATA-0011", "not a message"),
        ({"conversations": [{"from": "humn", "value": ""}], "chosen": GPT, "rejected": GPT}, "E-DATA-0012", "humn"),
    ],
)  # fmt: skip
def test_pairs_that_are_none(row: dict[str, Any], code: str, said: str) -> None:
    assert error(row).code == code
    assert said in error(row).message


def test_ratings() -> None:
    example = parse({"prompt": "1+1", "completion": "2", "label": True})
    assert (example.prompt, example.completions, example.columns) == ("1+1", ("2",), {"label": True})
    example = parse({"messages": [USER, GOOD], "label": False})
    assert (example.prompt, example.completions, example.columns) == (None, ([USER, GOOD],), {"label": False})
    example = parse({"conversations": [HUMAN, GPT], "label": False})
    assert example.completions == ([USER, GOOD],)
    example = parse({"instruction": "Hi", "output": "Hello", "label": False})
    assert (example.prompt, example.completions, example.columns) == ([USER], ([GOOD],), {"label": False})


@pytest.mark.parametrize("row", [{"text": "a", "label": True}, {"messages": [USER, GOOD], "label": "sports"}])
def test_other_labels_are_columns(row: dict[str, Any]) -> None:
    assert detect(row, ORIGIN, formats()).parse(row, ORIGIN).columns == {"label": row["label"]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preference pairs: train them with DPO"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "preference pairs: train them with DPO"),
        ({"prompt": "x", "completion": "a", "label": True}, "ratings: train them with KTO"),
        ({"messages": [USER, GOOD], "label": False}, "ratings: train them with KTO"),
    ],
)
def test_supervised_training_refuses_them_by_name(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare([row], chatml_tokenizer(), DataSettings())
    assert caught.value.code == "E-DATA-0017"
    assert said in caught.value.message
    good = {"messages": [USER, GOOD]}
    report = prepare([good, row], chatml_tokenizer(), DataSettings(on_bad_row="skip")).report
    assert (report.used, report.num_skipped) == (1, 1)


def test_ratings_are_trained_on_when_the_format_is_named() -> None:
    row = {"messages": [USER, GOOD], "label": True}
    with pytest.raises(DataError) as caught:
        detect(row, ORIGIN, formats())
    assert caught.value.hint == "to train on all answers alike, name the format: messages"
    assert prepare([row], chatml_tokenizer(), DataSettings(format="messages")).report.used == 1
    with pytest.raises(ConfigError, match="unknown data format 'preference'"):
        choose("preference", formats())


NAMES = {"question": "prompt", "answer": "completion"}


def test_columns_are_renamed_before_the_format_is_told() -> None:
    rows = [{"question": "1 + 1 =", "answer": " 2"}, {"prompt": "1 + 2 =", "completion": " 3"}]
    mapped = prepare(rows, plain_tokenizer(), DataSettings(column_map=NAMES))
    as_written = prepare([{"prompt": "1 + 1 =", "completion": " 2"}, rows[1]], plain_tokenizer(), DataSettings())
    assert [s[0].branches[0].ids.tolist() for s in mapped.samples] == [
        s[0].branches[0].ids.tolist() for s in as_written.samples
    ]
    assert mapped.report.formats == as_written.report.formats


def test_two_columns_of_one_name() -> None:
    with pytest.raises(DataError) as caught:
        prepare([{"question": "a", "prompt": "b", "answer": "c"}], plain_tokenizer(), DataSettings(column_map=NAMES))
    assert caught.value.code == "E-DATA-0050"
    assert "has a column `prompt` already" in caught.value.message
    swap = DataSettings(column_map={"prompt": "completion", "completion": "prompt"})
    assert prepare([{"prompt": "a b", "completion": "c"}], plain_tokenizer(), swap).report.used == 1
    with pytest.raises(ConfigError, match="two columns are to be renamed to 'prompt'"):
        DataSettings(column_map={"a": "prompt", "b": "prompt"})


HALVES: list[tuple[dict[str, Any], str]] = [
    ({"chosen": "Hello", "rejected": None}, '"rejected" is null, though there is `chosen`: half a pair'),
    ({"chosen": "Hello"}, '"rejected" is missing'),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": None}, '"rejected" is null'),
    ({"prompt": "Hi", "rejected": "Go"}, '"chosen" is missing'),
    ({"messages": [USER, GOOD], "chosen": [GOOD], "rejected": None}, '"rejected" is null'),
    ({"text": "a", "chosen": None, "rejected": {"role": "assistant", "content": "Go"}}, '"chosen" is null'),
    ({"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": None}, '"rejected" is null'),
]


@pytest.mark.parametrize(("row", "said"), HALVES)
@pytest.mark.parametrize("method", ["sft", "preference", "rated"])
def test_half_a_pair_is_named_whatever_stands_beside_it(row: dict[str, Any], said: str, method: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare([row], chatml_tokenizer(), DataSettings(method=method))
    assert (caught.value.code, said in caught.value.message) == ("E-DATA-0033", True)
    found = error(row)
    assert found.code == "E-DATA-0033"
    assert "--map" in (found.hint or "")


@pytest.mark.parametrize("own", [{"chosen": 2}, {"chosen": True, "rejected": None}, {"chosen": None, "rejected": None},
                                 {"chosen": ""}])  # fmt: skip
def test_columns_that_are_no_half_of_a_pair(own: dict[str, Any]) -> None:
    assert prepare([{"messages": [USER, GOOD], **own}], chatml_tokenizer(), DataSettings()).report.used == 1


def test_half_a_pair_is_read_where_the_format_is_named() -> None:
    row = {"messages": [USER, GOOD], "chosen": "B"}
    assert prepare([row], chatml_tokenizer(), DataSettings(format="messages")).report.used == 1
    with pytest.raises(DataError) as caught:
        prepare([row], chatml_tokenizer(), DataSettings(method="preference", format="preference"))
    assert caught.value.code == "E-DATA-0033"


@pytest.mark.parametrize("answer", [{"messages": [USER, GOOD]}, {"prompt": "Hi", "completion": "Hello"}])
def test_a_rating_that_is_null_is_named(answer: dict[str, Any]) -> None:
    with pytest.raises(DataError, match='"label" is null') as caught:
        prepare([{**answer, "label": None}], chatml_tokenizer(), DataSettings(method="rated"))
    assert caught.value.code == "E-DATA-0028"


def test_a_null_among_ratings_is_named_in_supervised_training_and_by_the_check() -> None:
    rated, unrated = {"messages": [USER, GOOD], "label": True}, {"messages": [USER, BAD], "label": None}
    report = prepare([rated, unrated], chatml_tokenizer(), DataSettings(on_bad_row="skip")).report
    assert any("1 rows (first: train[1]) have a `label` that is no rating" in note for note in report.notes())
    found = [one for one in check([rated, unrated]).findings if one.code == "E-DATA-0065"]
    assert [(one.severity, one.count, one.first) for one in found] == [("error", 1, ("data[1]",))]
    own = {"messages": [USER, GOOD], "label": "greeting"}
    assert prepare([own, unrated], chatml_tokenizer(), DataSettings()).report.notes() == [
        "read as messages: column `messages` with keys `role`, `content`"
    ]
    assert "E-DATA-0065" not in [one.code for one in check([own, unrated]).findings]


def test_an_answer_that_only_others_give_is_refused() -> None:
    for row in ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]},
                {"prompt": [USER], "completion": [USER], "label": True}):  # fmt: skip
        assert error(row).code == "E-DATA-0022"
