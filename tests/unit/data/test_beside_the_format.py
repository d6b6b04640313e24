"""Rows beside which there is more than their format reads: pairs beside their question, Alpaca beside its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.data.change import convert
from posttrain.data.columns import parse_names
from posttrain.data.doctor.check import check
from posttrain.data.formats import all_formats, detect
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError
from posttrain.types import Example, Origin
from tests.doctor_files import codes, pair
from tests.tiny_tokenizers import chatml_tokenizer

QUESTION = "What is two plus two?"
ORIGIN = Origin("pairs.jsonl", 6, 7)


def read(row: dict[str, Any]) -> Example:
    return detect(row, ORIGIN, all_formats()).parse(row, ORIGIN)


@pytest.mark.parametrize("column", ["question", "instruction", "query", "input", "problem"])
@pytest.mark.parametrize("lists", [False, True])
def test_a_pair_beside_its_question(column: str, lists: bool) -> None:
    answers: dict[str, Any] = {"chosen": "Four.", "rejected": "Five."}
    if lists:
        answers = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    row = {"system": "Be brief.", column: QUESTION, **answers}
    with pytest.raises(DataError, match=rf"pairs\.jsonl:7  \"{column}\" is in neither answer") as caught:
        read(row)
    assert caught.value.code == "E-DATA-0160"
    pasted = str(caught.value.hint).split()[1]
    assert pasted == f"{column}=prompt"
    assert codes([row]) == ["E-DATA-0160"]
    names = parse_names([pasted])
    report = check([row], data=DataSettings(column_map=names))
    assert (report.usable, report.errors) == (1, 0)
    ((tokenized,),) = prepare([row], chatml_tokenizer(), DataSettings(method="preference", column_map=names)).samples
    assert QUESTION in chatml_tokenizer().decode(tokenized.prefix)
    with pytest.raises(DataError) as named:
        prepare([row], chatml_tokenizer(), DataSettings(method="preference", format="preference"))
    assert named.value.code == "E-DATA-0160"


def test_a_pair_that_says_its_question() -> None:
    shared = f"Q: {QUESTION}\nA:"
    assert read({"question": QUESTION, "chosen": shared + " Four.", "rejected": shared + " Six."}).prompt == shared
    asked = [{"role": "user", "content": QUESTION}]
    four, five = ([*asked, {"role": "assistant", "content": text}] for text in ("Four.", "Five."))
    assert read({"question": QUESTION, "chosen": four, "rejected": five}).prompt == asked
    assert read({**pair(QUESTION, "Four.", "Five."), "query": "arithmetic"}).prompt == QUESTION
    assert read({"conversations": [{"from": "human", "value": "Hi"}], "input": "x", "chosen": "a", "rejected": "b"})
    assert read({"own_question": QUESTION, "chosen": "Four.", "rejected": "Six."}).prompt is None


FRAME = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
ALPACA = {"instruction": "Double it.", "input": "21", "output": "42 it is."}
RENDERED = {**ALPACA, "text": FRAME.format("Double it.", "21", "42 it is.")}


def test_alpaca_beside_its_text_is_alpaca() -> None:
    assert read(RENDERED) == read(ALPACA)
    note = prepare([RENDERED], chatml_tokenizer(), DataSettings()).report.notes()[0]
    assert note.startswith("read as Alpaca: columns `instruction`, `input`, `output`, as a conversation; `text`, which")
    assert "format=text" in note
    assert codes([RENDERED]) == []
    example = all_formats()["text"].parse(RENDERED, ORIGIN)
    named = prepare([RENDERED], chatml_tokenizer(), DataSettings(format="text"))
    assert chatml_tokenizer().decode(named.samples[0][0].branches[0].ids).startswith(str(example.completions[0]))


@pytest.mark.parametrize(
    "row",
    [
        {**ALPACA, "text": "Another text."},
        {**RENDERED, "output": "43"},
        {**RENDERED, "output": None},
        {**RENDERED, "input": "22"},
    ],
)
def test_another_text_beside_alpaca_is_read_as_text(row: dict[str, Any]) -> None:
    assert read(row).completions == (row["text"],)


def test_an_empty_output_beside_its_text_is_not_trained_as_text() -> None:
    assert codes([{**RENDERED, "output": "", "text": FRAME.format("Double it.", "21", "")}]) == ["E-DATA-0013"]


def test_a_text_column_that_was_named_is_read() -> None:
    row = {**ALPACA, "body": RENDERED["text"]}
    assert detect(row, ORIGIN, all_formats("body")).describe(row) == "read as text: column `body`"


def test_the_text_of_alpaca_does_not_go_along(tmp_path: Path) -> None:
    convert([{**RENDERED, "id": 3}], "messages", tmp_path / "out.jsonl", DataSettings())
    ((_, row),) = read_rows(tmp_path / "out.jsonl")
    assert row.keys() == {"messages", "id"}
    assert codes([row]) == []
