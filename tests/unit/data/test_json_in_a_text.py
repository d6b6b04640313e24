"""Messages, calls and pairs that stand as JSON in a text: one rule for files of every kind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.columns import read_columns
from posttrain.data.doctor.check import check
from posttrain.data.formats import all_formats, detect
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.view import view_rows
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


AS_TEXT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": json.dumps([USER, ANSWER])}, {"messages": [USER, ANSWER]}),
    ({"conversations": json.dumps([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])},
     {"messages": [USER, ANSWER]}),
    ({"messages": [USER, {**ANSWER, "tool_calls": json.dumps([CALLED])}]},
     {"messages": [USER, {**ANSWER, "tool_calls": [CALLED]}]}),
    ({"messages": [USER, {**ANSWER, "tool_calls": ""}]}, {"messages": [USER, ANSWER]}),
    ({"instruction": "Hi", "output": "Hello", "history": '[["a", "b"]]'},
     {"instruction": "Hi", "output": "Hello", "history": [["a", "b"]]}),
]  # fmt: skip


@pytest.mark.parametrize(("written", "meant"), AS_TEXT)
@pytest.mark.parametrize("source", ["list", "jsonl", "json"])
def test_json_in_a_text(written: dict[str, Any], meant: dict[str, Any], source: str, tmp_path: Path) -> None:
    rows: Any = [written]
    if source != "list":
        rows = tmp_path / f"a.{source}"
        rows.write_text(json.dumps(written if source == "jsonl" else [written]))
    settings = DataSettings(chat_template="chatml")
    (ours,), (expected,) = (prepare(r, chatml_tokenizer(), settings).samples for r in (rows, [meant]))
    assert ours[0].branches[0].ids.tolist() == expected[0].branches[0].ids.tolist()
    assert (check(rows).usable, check(rows).errors) == (1, 0)


def test_json_in_a_text_that_is_none(tmp_path: Path) -> None:
    found = error({"messages": '[{"role": "user", '})
    assert (found.code, found.message.startswith('train.jsonl:17  "messages" is text that is not valid JSON')) == (
        "E-DATA-0011", True)  # fmt: skip
    assert '"messages" is an object' in error({"messages": json.dumps({"role": "user", "content": "Hi"})}).message
    call = {"messages": [USER, {**ANSWER, "tool_calls": "[{"}]}
    assert '"messages[1].tool_calls" is not valid JSON' in error(call).message
    assert parse({"text": "Hi", "conversations": "[USER]: Hi"}).completions == ("Hi",)


PROMPT, SAID, OTHER = (json.dumps([one]) for one in (USER, ANSWER, {**ANSWER, "content": "Go"}))
AS_MESSAGES: list[dict[str, Any]] = [
    {"prompt": PROMPT, "completion": SAID},
    {"prompt": PROMPT, "chosen": SAID, "rejected": OTHER},
    {"prompt": "Hi", "chosen": SAID, "rejected": OTHER},
    {"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, {**ANSWER, "content": "Go"}])},
]
LEFT_AS_TEXT: list[dict[str, Any]] = [
    {"prompt": PROMPT, "completion": "Hello"},
    {"prompt": "Hi", "completion": SAID},
    {"prompt": PROMPT, "chosen": SAID, "rejected": "Go"},
    {"prompt": "Hi", "chosen": "Hello", "rejected": OTHER},
]


def columns_as(kind: str, row: dict[str, Any], folder: Path) -> Any:
    if kind == "list":
        return [row]
    path = folder / f"a.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([row.keys(), row.values()])
    elif kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").Table.from_pylist([row]), path
        )
    else:
        path.write_text(json.dumps(row if kind == "jsonl" else [row]))
    return path


@pytest.mark.parametrize("kind", ["list", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("row", [*AS_MESSAGES, *LEFT_AS_TEXT])
def test_one_rule_for_messages_as_json_in_a_text(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    is_read, source = row in AS_MESSAGES, columns_as(kind, row, tmp_path)
    method = "sft" if "completion" in row else "preference"
    example = parse(next(dict(one) for _, one in read_rows(source)))
    assert [isinstance(part, list) for part in example.completions] == [is_read] * len(example.completions)
    report = check(source)
    code, severity = ("W-DATA-0152", "info") if is_read else ("W-DATA-0153", "warning")
    assert [(one.code, one.severity, one.count) for one in report.findings] == [(code, severity, 1)]
    made = prepare(source, chatml_tokenizer(), DataSettings(method=method)).report
    assert (made.from_json.count, made.json_as_text.count, made.conversational) == (is_read, not is_read, is_read)
    assert ("read as the messages that it stands for" in "".join(made.notes())) is is_read
    lengths = check(source, tokenizer=chatml_tokenizer()).lengths
    assert (lengths.unusable, lengths.supervised > 0) == (0, True)
    (view,) = view_rows(source, [0], chatml_tokenizer())
    assert view.error is None


def test_rows_of_both_ways_are_counted() -> None:
    rows = [{"prompt": [USER], "completion": [ANSWER]}, AS_MESSAGES[0], {"messages": json.dumps([USER, ANSWER])}]
    report = prepare(rows, chatml_tokenizer(), DataSettings()).report
    assert any(note.startswith("2 rows (first: train[1]) hold messages as JSON in a text") for note in report.notes())
    assert finding(check(rows), "W-DATA-0152").sentence.startswith("2 rows hold messages as JSON in a text (67 %)")


@pytest.mark.parametrize("answer", ['[{"from": "Paris", "to": "Rome"}]', '[{"role": "x"}]', "[]", "[{", '[{"a": 1}]'])
def test_other_json_is_text(answer: str) -> None:
    row = {"prompt": f" {answer}", "completion": answer}
    assert parse(row).completions == (answer,)
    row = {"prompt": "Flights?", "completion": answer}
    assert codes([row]) == []


def test_renamed_columns_of_a_table_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('chat\n"' + json.dumps([USER, ANSWER]).replace('"', '""') + '"\n')
    settings = DataSettings(column_map={"chat": "messages"})
    assert prepare(path, chatml_tokenizer(), settings).report.used == 1


def test_a_formatting_func_gets_the_row_as_it_is() -> None:
    seen: list[Any] = []

    def formatted(row: dict[str, Any]) -> str:
        seen.append(row["messages"])
        return "Hi"

    prepare([{"messages": "[]"}], chatml_tokenizer(), DataSettings(formatting_func=formatted))
    assert seen == ["[]"]


@pytest.mark.parametrize("column", ["text", "prompt", "completion", "chosen"])
def test_messages_as_python_prints_them(column: str) -> None:
    row = {"prompt": "Hi", "completion": "Hello"} if column in ("prompt", "completion") else {"text": "Hi"}
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"} if column == "chosen" else row
    assert codes([row]) == []
    assert codes([{**row, column: str([USER, ANSWER])}]) == ["W-DATA-0153"]


@pytest.mark.parametrize("kind", ["list", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_the_way_from_what_python_prints(column: str, kind: str, tmp_path: Path) -> None:
    report = check(columns_as(kind, {column: str([USER, ANSWER])}, tmp_path))
    (bad,) = report.bad_rows
    assert (bad["code"], bad["hint"]) == ("E-DATA-0011", "Python printed it: write it with json.dumps(...)")
