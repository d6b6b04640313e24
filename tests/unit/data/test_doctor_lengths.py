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


def test_rows_that_lose_their_whole_answer_are_no_usable_ones() -> None:
    long = row("one two three four five six seven eight " * 9, "Yes.")
    settings = DataSettings(max_length=40)
    report = check([long, *plain(3)], data=settings, tokenizer=TOKENIZER)
    found = finding(report, "E-DATA-0030")
    assert (found.severity, found.count, found.first) == ("warning", 1, ("data[0]",))
    assert (report.rows, report.usable, report.errors) == (4, 3, 0)
    assert prepare([long, *plain(3)], TOKENIZER, DataSettings(assistant_only=None, max_length=40)).report.used == 3
    nothing = check([long, {**long, "id": 3}], data=settings, tokenizer=TOKENIZER)
    found = finding(nothing, "E-DATA-0030")
    assert (found.severity, found.count, nothing.usable, nothing.errors) == ("error", 2, 0, 1)
    assert "2 rows have no token to train within 40 tokens, and are left out: nothing is left" in found.sentence
    kept = check([long], data=DataSettings(max_length=40, truncation_mode="keep_end"), tokenizer=TOKENIZER)
    assert kept.usable == 1


def test_a_pair_that_is_left_out_is_one_row() -> None:
    pairs = [pair("one two three four five six seven eight " * 9, "Yes.", "No."), pair("a", "b", "c")]
    report = check(pairs, data=DataSettings(max_length=20), tokenizer=plain_tokenizer())
    assert (report.usable, finding(report, "E-DATA-0030").count) == (1, 1)
    trained = prepare(pairs, plain_tokenizer(), DataSettings(method="preference", completion_only=True, max_length=20))
    assert trained.report.used == 1
