"""What a row holds beside its format: honoured, refused, or named once, in training's report and in the check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.data.doctor.check import check
from posttrain.data.formats import all_formats, detect
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.types import Example, Origin
from tests.doctor_files import codes, finding, plain, write
from tests.tiny_tokenizers import chatml_tokenizer

ORIGIN = Origin("train.jsonl", 16, 17)
SYSTEM, USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("assistant", "Go"))
)
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def parse(row: dict[str, Any]) -> Example:
    return detect(row, ORIGIN, all_formats()).parse(row, ORIGIN)


def notes(*rows: dict[str, Any], **settings: Any) -> str:
    return "\n".join(prepare([*rows], chatml_tokenizer(), DataSettings(**settings)).report.notes())


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, GOOD]},
    "prompt-completion": {"prompt": [USER], "completion": [GOOD]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "Hi", "output": "Hello"},
    "pairs": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit pairs": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ranking": {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT},
    "rated": {"messages": [USER, GOOD], "label": True},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_system_column_is_the_first_message(name: str) -> None:
    example = parse({**CONVERSATIONS[name], "system": "Be kind.", "id": 3})
    before: Any = example.prompt if example.prompt is not None else example.completions[0]
    assert before[:2] == [SYSTEM, USER]
    assert {key for key in example.columns if key != "label"} == {"id"}
    blank = parse({**CONVERSATIONS[name], "system": "  "})
    assert SYSTEM not in (blank.prompt if blank.prompt is not None else blank.completions[0])


@pytest.mark.parametrize("name", ["messages", "prompt-completion", "pairs", "implicit pairs", "rated"])
def test_two_system_messages_are_refused(name: str) -> None:
    row = CONVERSATIONS[name]
    own = {key: [SYSTEM, *value] if isinstance(value, list) and USER in value else value for key, value in row.items()}
    with pytest.raises(DataError, match='"system" stands beside a system message of the conversation') as caught:
        parse({**own, "system": "Be brief."})
    assert caught.value.code == "E-DATA-0032"
    assert "--map system=own_system" in (caught.value.hint or "")
    assert parse({**own, "system": " Be kind.\n"}) == parse(own) if "label" not in row else True


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_system_column_that_is_no_text(name: str) -> None:
    with pytest.raises(DataError, match=r'train\.jsonl:17  "system" is a number, not text') as caught:
        parse({**CONVERSATIONS[name], "system": 5})
    assert caught.value.code == "E-DATA-0011"


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [USER, GOOD], "system_prompt": "Be kind."}, "system_prompt", "--map system_prompt=system"),
    ({"conversations": [HUMAN, GPT], "system_prompt": "Be kind."}, "system_prompt", "--map system_prompt=system"),
    ({"instruction": "Sum up.", "context": "A story.", "output": "Short."}, "context", "--map context=input"),
    ({"text": "Hi", "tools": json.dumps(TOOLS)}, "tools", "text has no system message and no tools"),
    ({"prompt": "Hi", "completion": " Hello", "system": "Be kind."}, "system", "text has no system message"),
    ({"prompt": "Hi", "completion": " Hello", "history": [["a", "b"]]}, "history", "or leave it out"),
    ({"messages": [USER, GOOD], "functions": [{"name": "look"}]}, "functions", "--map functions=tools"),
    ({"messages": [{**SYSTEM, "tools": TOOLS}, USER, GOOD]}, "messages[].tools", "in a column `tools` of the row"),
    ({"messages": [USER, GOOD], "prompt": "Good day"}, "prompt", "where the format looks for it"),
    ({"prompt": "Hi", "completion": " Hello", "input": "1, 2"}, "input", "where the format looks for it"),
    ({"messages": [USER, GOOD], "reasoning": "They greet."}, "reasoning", "where the format looks for it"),
]


@pytest.mark.parametrize(("row", "column", "way_out"), CASES)
def test_what_looks_meant_is_named(row: dict[str, Any], column: str, way_out: str) -> None:
    (said,) = [line for line in notes(row, row, *plain(1)).splitlines() if column in line]
    assert said.startswith(f"2 rows (first: train[0]) have `{column}`, which their format has no place for")
    assert way_out in said
    report = check([row, *plain(2)])
    found = finding(report, "W-DATA-0131")
    assert (found.count, found.first, found.severity) == (1, ("data[0]",), "warning")
    assert f"(`{column}` 1)" in found.sentence


def test_what_is_empty_or_the_users_own_is_not() -> None:
    row = {"messages": [USER, GOOD], "system_prompt": "", "history": [], "functions": None, "id": 3, "label": None}
    row |= {"prompt": " Hi", "answer": "Hello"}  # which is said
    assert notes(row) == "read as messages: column `messages` with keys `role`, `content`"
    report = check([row])
    assert (report.findings, report.unused) == ([], {"id": 1, "prompt": 1, "answer": 1})


def test_renaming_honours_it() -> None:
    row = {"messages": [USER, GOOD], "system_prompt": "Be kind."}
    prepared = prepare([row], chatml_tokenizer(), DataSettings(column_map={"system_prompt": "system"}))
    as_message = prepare([{"messages": [SYSTEM, USER, GOOD]}], chatml_tokenizer(), DataSettings())
    ids = [prepared.samples[0][0].branches[0].ids.tolist() for prepared in (prepared, as_message)]
    assert ids[0] == ids[1]
    assert prepared.report.no_place == {}


MORE = [USER, {"role": "assistant", "content": "Hello, and welcome."}]
BOTH: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [USER, GOOD], "instruction": "Hi", "output": "Good day"}, "messages", "alpaca"),
    ({"prompt": "Hi", "completion": " Hello", "text": "Hi: Hello"}, "prompt-completion", "text"),
    ({"messages": [USER, GOOD], "text": "Hi, Hello"}, "messages", "text"),
    ({"prompt": "Hi", "completion": " Hello", "messages": MORE}, "prompt-completion", "messages"),
    ({"conversations": [HUMAN, GPT], "messages": [SYSTEM, USER, GOOD]}, "ShareGPT", "messages"),
    ({"conversations": [HUMAN, GPT], "messages": [USER, GOOD, USER]}, "ShareGPT", "messages"),
    ({"conversations": [HUMAN, GPT], "messages": [GOOD, USER]}, "ShareGPT", "messages"),
    ({"input_ids": [5, 6, 7], "messages": [USER, GOOD]}, "tokens", "messages"),
]


@pytest.mark.parametrize(("row", "read_as", "other"), BOTH)
def test_a_row_of_several_formats(row: dict[str, Any], read_as: str, other: str) -> None:
    said = notes(row, row)
    assert f"read as {read_as}" in said
    assert f"2 rows (first: train[0]) could be read as {other} too, which is passed over" in said
    assert "format=... (--format) names" in said
    found = finding(check([row]), "W-DATA-0132")
    assert (found.count, found.severity) == (1, "warning")
    assert f"({other} 1)" in found.sentence


def test_ultrafeedback_says_the_chosen_answer_twice() -> None:
    """`messages` holds it too: as what was said before, it would give the answer away."""
    row = {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}
    example = parse(row)
    assert (example.prompt, example.completions) == ([USER], ([GOOD], [BAD]))
    assert codes([row]) == []


SAME: list[dict[str, Any]] = [
    {"conversations": [HUMAN, GPT], "instruction": "Hi", "input": "", "output": "Hello"},
    {"conversations": [{"from": "system", "value": "Be kind."}, HUMAN, GPT], "instruction": "Hi", "output": " Hello\n"},
    {"messages": [USER, GOOD], "prompt": "Hi", "completion": "Hello"},
    {"prompt": "Hi", "completion": " Hello", "text": "Hi Hello"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "completion": [BAD]},
]


@pytest.mark.parametrize("row", SAME)
def test_what_is_said_twice_is_no_second_format(row: dict[str, Any]) -> None:
    assert codes([row]) == []
    if "chosen" not in row:
        assert "too, which is passed over" not in notes(row)


def test_a_format_named_by_hand_was_chosen() -> None:
    row = {"messages": [USER, GOOD], "instruction": "Name a bird.", "output": "A wren.", "system_prompt": "Be kind."}
    report = check([row], data=DataSettings(format="messages"))
    assert [found.code for found in report.findings] == ["W-DATA-0131"]
    assert "(`system_prompt` 1)" in report.findings[0].sentence
    assert report.unused == {"instruction": 1, "output": 1, "system_prompt": 1}
    said = notes(row, format="messages")
    assert "passed over" not in said
    assert "`instruction`" not in said
    assert {"W-DATA-0131", "W-DATA-0132"} == {*codes([row])}


def test_the_check_lists_columns_that_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "id": i, "source": "web", "score": None} for i, row in enumerate(plain(3))]
    assert main(["data", "check", str(write(tmp_path / "a.jsonl", rows))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].strip() == "columns not used: id, source"
    wide = [{**row, **{f"c{n}": 1 for n in range(30)}} for row in plain(2)]
    main(["data", "check", str(write(tmp_path / "b.jsonl", wide))])
    assert "c19 and 10 more" in capsys.readouterr().out


def test_margins_of_pairs_and_labels_of_ratings_are_used() -> None:
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "margin": 0.5}
    assert check([pair]).unused == {}
    assert check([{"prompt": "Hi", "completion": "Hello", "label": True}]).unused == {}
    assert check([{"text": "Hello", "margin": 0.5}]).unused == {"margin": 1}
