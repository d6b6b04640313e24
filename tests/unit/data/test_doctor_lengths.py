"""Lengths in characters and in tokens: what max_length cuts off is what training reports."""

from __future__ import annotations

from posttrain.data.doctor.check import check
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from tests.doctor_files import finding, pair, plain, rated, row
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

TOKENIZER = chatml_tokenizer()


def test_characters() -> None:
    about = check([{"text": "a" * n} for n in range(1, 102)]).lengths.to_dict()
    assert [about[name] for name in ("shortest", "median", "percentile_95", "longest")] == [1, 51, 96, 101]
    assert (about["unit"], about["rows"], about["total"]) == ("characters", 101, 5151)


def test_tokens_and_what_is_cut_are_those_of_training() -> None:
    rows = [*plain(6), row("Count.", "one two three four five six seven " * 8)]
    lengths = check(rows, tokenizer=TOKENIZER).lengths.to_dict()
    whole = prepare(rows, TOKENIZER, DataSettings(assistant_only=None)).report
    assert (lengths["total"], lengths["supervised"]) == (whole.tokens, whole.supervised)
    limit = lengths["longest"] - 10
    report = check(rows, data=DataSettings(max_length=limit), tokenizer=TOKENIZER)
    trained = prepare(rows, TOKENIZER, DataSettings(assistant_only=None, max_length=limit)).report
    about = report.lengths.to_dict()
    assert about["limit"] == limit
    assert (about["cut"], about["supervised_lost"]) == (1, trained.supervised_lost)
    found = finding(report, "W-DATA-0107")
    assert (found.count, found.first) == (1, ("data[6]",))
    assert found.sentence.startswith(f"1 of 7 sequences (14 %) are longer than {limit} tokens: ")
    assert f"--max-length {lengths['longest']}" in found.fix


def test_an_answer_that_is_lost_whole() -> None:
    rows = [row("one two three four five six seven eight " * 9, "Yes."), *plain(3)]
    report = check(rows, data=DataSettings(max_length=40), tokenizer=TOKENIZER)
    assert report.lengths.to_dict()["emptied"] == 1
    assert "with them the whole answer of 1" in finding(report, "W-DATA-0107").sentence


def test_nothing_is_cut() -> None:
    report = check(plain(3), data=DataSettings(max_length=500), tokenizer=TOKENIZER)
    assert report.findings == []


def test_both_answers_of_a_pair_and_rated_ones_are_counted() -> None:
    tokenizer = plain_tokenizer()
    assert check([pair("a b", "c d", "e")], tokenizer=tokenizer).lengths.to_dict()["rows"] == 2
    assert check([rated("a b", "c d", True)], tokenizer=tokenizer).lengths.to_dict()["rows"] == 1


def test_columns_are_renamed_here_too() -> None:
    names = {"question": "prompt", "answer": "completion"}
    report = check(
        [{"question": "a b", "answer": "c"}], data=DataSettings(column_map=names), tokenizer=plain_tokenizer()
    )
    assert report.lengths.to_dict()["rows"] == 1


def test_a_model_that_cannot_use_them_is_a_finding() -> None:
    report = check(plain(3), tokenizer=plain_tokenizer())  # it has no chat template
    found = next(found for found in report.findings if found.severity == "error")
    assert (
        found.sentence == "tokens were not counted: the data are conversations, but the tokenizer has no chat template"
    )
    assert report.lengths.to_dict()["rows"] == 0
