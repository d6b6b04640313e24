"""Preparing whole data sets: limits, skipping, counting, order, and rows that come as tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.prepare import Prepared, prepare, stream
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError
from posttrain.types import Sample
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

ROWS = [{"text": f"Row number {i}: " + "two plus two. " * (i % 7)} for i in range(40)]


def run(rows: Any, **settings: Any) -> Prepared:
    return prepare(rows, plain_tokenizer(), DataSettings(**settings))


def ids(samples: list[Sample]) -> list[list[int]]:
    return [[int(i) for part in sample for i in part.branches[0].ids] for sample in samples]


def test_shuffling_equals_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    plain = ids(run(ROWS).samples)
    order = datasets.Dataset.from_dict({"i": range(40)}).shuffle(seed=7)["i"]
    assert ids(run(ROWS, shuffle=True, shuffle_seed=7).samples) == [plain[i] for i in order]
    assert ids(run(ROWS).samples) == plain


def test_truncation_is_counted() -> None:
    whole = run(ROWS).report
    for mode, kept in (("keep_start", slice(None, 12)), ("keep_end", slice(-12, None))):
        prepared = run(ROWS, max_length=12, truncation_mode=mode)
        assert ids(prepared.samples) == [row[kept] for row in ids(run(ROWS).samples)]
        report = prepared.report
        long = [row for row in ids(run(ROWS).samples) if len(row) > 12]
        assert report.truncated.count == len(long) > 0
        assert report.tokens_lost == sum(len(row) - 12 for row in long)
        assert report.supervised_lost == whole.supervised - report.supervised
        assert report.tokens + report.tokens_lost == whole.tokens


def test_rows_whose_answer_is_cut_off_are_dropped_and_counted() -> None:
    rows = [{"prompt": "What is two plus two? " * 3, "completion": "Four."}, {"prompt": "Two", "completion": " plus"}]
    prepared = run(rows, max_length=8)
    assert len(prepared.samples) == prepared.report.used == 1
    whole, prompt = (len(plain_tokenizer()(text)["input_ids"]) for text in ("Two plus</s>", "Two"))
    share = f"{100 * (whole - prompt) / whole:.1f} % of tokens trained"
    assert (
        prepared.report.summary()
        == f"train 2 rows: 1 used, 1 skipped (nothing left to train within max_length); {share}"
    )
    with pytest.raises(DataError, match="none of 1 rows is left") as caught:
        run(rows[:1], max_length=8)
    assert "max_length=8 leaves no token to train in any row" in (caught.value.hint or "")


def test_bad_rows_raise_or_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    good = [json.dumps({"prompt": "Two plus two?", "completion": " Four."})] * 3
    bad = ["not json", json.dumps({"prompt": "a", "completion": " "}), json.dumps({"question": "a"})]
    path.write_text("\n".join([good[0], *bad, *good[1:], bad[1]]) + "\n")
    with pytest.raises(DataError, match=r"train.jsonl:2:1  not valid JSON"):
        run(path)
    report = run(path, on_bad_row="skip").report
    assert (report.rows, report.used, report.num_skipped) == (7, 3, 4)
    assert {reason: cases.count for reason, cases in report.skipped.items()} == {
        "broken JSON": 1,
        "empty completion": 2,
        "unknown format": 1,
    }
    assert [origin.line for origin in report.skipped["empty completion"].first] == [3, 7]
    assert report.summary().startswith(
        "train.jsonl 7 rows: 3 used, 4 skipped (1 broken JSON, 2 empty completion, 1 unknown format);"
    )
    assert json.loads(json.dumps(report.to_dict()))["skipped"]["broken JSON"] == {"count": 1, "first": [f"{path}:2"]}


def test_summary_groups_digits() -> None:
    report = run(ROWS * 30).report
    tokens = 30 * sum(len(row) for row in ids(run(ROWS).samples))
    share = f"{100 * (tokens - 1200) / tokens:.1f} % of tokens trained"  # all but the first token of each
    assert report.summary() == f"train 1 200 rows: 1 200 used; {share}"
    assert report.notes() == ["read as text: column `text`"]


def test_all_rows_skipped_says_why() -> None:
    with pytest.raises(DataError, match=r"none of 2 rows is left \(2 empty text\)") as caught:
        run([{"text": ""}, {"text": " "}], on_bad_row="skip")
    assert caught.value.code == "E-DATA-0031"
    assert 'train[0]  "text" is empty' in (caught.value.hint or "")


def test_formatting_func() -> None:
    rows = [{"a": "two", "b": "four"}]
    assert run(rows, formatting_func=lambda row: f"{row['a']} {row['b']}").samples[0][0].num_tokens > 1
    formatted = ids(run(rows, formatting_func=lambda row: f"{row['a']} {row['b']}").samples)
    assert formatted == ids(run([{"text": "two four"}]).samples)
    with pytest.raises(DataError, match=r"train\[0\]  formatting_func returned a list") as caught:
        run(rows, formatting_func=lambda row: ["two"])
    assert "one row at a time" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="formatting_func makes one text"):
        DataSettings(formatting_func=str, completion_only=True)
    with pytest.raises(KeyError) as raised:
        run(rows, formatting_func=lambda row: row["c"])
    assert raised.value.__notes__ == ["formatting_func failed on train[0]"]


def test_formats_may_be_named() -> None:
    row = {"text": "a b", "instruction": "a", "output": "b"}
    prepared = prepare([row], chatml_tokenizer(), DataSettings(format="alpaca"))
    assert prepared.is_conversational
    with pytest.raises(DataError, match="is not of format 'sharegpt'"):
        run([row], format="sharegpt")


def test_rows_of_different_formats() -> None:
    rows = [{"text": "a b"}, {"prompt": "a", "completion": " b"}]
    report = run(rows).report
    assert list(report.formats.values()) == [1, 1]
    assert not run(rows).is_conversational


def test_columns_are_kept_on_request() -> None:
    rows = [{"text": "a b", "label": True}]
    assert run(rows).samples[0][0].columns == {}
    assert run(rows, columns=("label",)).samples[0][0].columns == {"label": True}


def test_rows_that_come_as_tokens() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7], "assistant_masks": [0, 0, 1]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 0]},
        {"input_ids": [5, 6, 7]},
    ]
    masks = [sample[0].branches[0].supervised.tolist() for sample in run(rows).samples]
    assert masks == [[False, True, True], [False, False, True], [True, True, True], [True, True, True]]
    (only,) = run([rows[2]], completion_only=True).samples
    assert only[0].branches[0].supervised.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [5, 100000]}, '"input_ids" holds 100000, but the tokenizer has ids 0 to'),
        ({"input_ids": [5, 6], "labels": [6]}, '"labels" has 1 elements, `input_ids` 2'),
        ({"input_ids": [5, 6], "labels": [-100, 7]}, r'"labels\[1\]" is 7 but input_ids\[1\] is 6'),
        ({"input_ids": ["a"]}, '"input_ids" is not a list of integers'),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token of the row would be trained"),
    ],
)
def test_malformed_tokens(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        run([row])


@pytest.mark.parametrize("settings", [{"completion_only": True}, {"assistant_only": True}])
def test_tokens_without_the_mask_that_is_asked_for(settings: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="neither `labels` nor"):
        run([{"input_ids": [5, 6]}], **settings)


def test_packing_is_counted() -> None:
    report = run(ROWS, packing=True, max_length=30).report
    packed = run(ROWS, packing=True, max_length=30).samples
    assert report.packs == len(packed) < 40
    assert report.tokens == sum(len(row) for row in ids(packed))
    assert report.truncated.count == sum(len(row) > 30 for row in ids(run(ROWS).samples)) > 0
    assert f"{report.packs} packs" in report.summary()


def test_answers_cut_off_in_packs_are_noted() -> None:
    rows = [{"prompt": "What is two plus two? " * 3, "completion": "Four."}, {"prompt": "Two", "completion": " plus"}]
    report = run(rows, packing=True, max_length=8).report
    assert report.untrained.count == 1
    assert "1 rows (first: train[0]) are packed without their answer" in report.notes()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"packing": True}, "packing needs max_length"),
        ({"max_length": 0}, "max_length is 0"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'\n  = known: keep_start, keep_end"),
        ({"packing_strategy": "ffd"}, "known: bfd, bfd_split, wrapped"),
        ({"on_bad_row": "ignore"}, "known: error, skip"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataSettings(**settings)


@pytest.mark.parametrize("settings", [{}, {"max_length": 12}, {"packing": True, "max_length": 30}])
def test_a_stream_gives_the_same_samples(settings: dict[str, Any]) -> None:
    datasets = pytest.importorskip("datasets")
    source = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    report = DataReport("train")
    streamed = list(stream(source, plain_tokenizer(), DataSettings(**settings), report=report))
    assert ids(streamed) == ids(run(ROWS, **settings).samples)
    assert report.used == 40
    endless = ({"text": "a b"} for _ in iter(int, 1))
    assert len(next(stream(endless, plain_tokenizer(), DataSettings()))) == 1


def test_a_stream_is_shuffled_by_its_source() -> None:
    datasets = pytest.importorskip("datasets")
    source = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    settings = DataSettings(shuffle=True, shuffle_seed=3)
    shuffled = list(stream(source.shuffle(seed=3), plain_tokenizer(), DataSettings()))
    assert ids(list(stream(source, plain_tokenizer(), settings))) == ids(shuffled)


def test_any_other_stream_is_shuffled_in_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.data.prepare.SHUFFLE_BUFFER", 10)
    plain = ids(list(stream(ROWS, plain_tokenizer(), DataSettings())))
    one, same, other = (
        ids(list(stream(ROWS, plain_tokenizer(), DataSettings(shuffle=True, shuffle_seed=seed)))) for seed in (3, 3, 4)
    )
    assert one == same
    assert len({str(order) for order in (plain, one, other)}) == 3
    assert sorted(map(str, one)) == sorted(map(str, plain))
    early = [place for place, example in enumerate(one) if example in plain[:5]]
    assert min(early) < 25


def test_real_files(shared_data: Path) -> None:
    tokenizer = chatml_tokenizer()
    alpaca = prepare(shared_data / "alpaca_en_demo.json", tokenizer, DataSettings())
    assert (alpaca.report.rows, alpaca.report.used, alpaca.report.num_skipped) == (999, 999, 0)
    first = alpaca.samples[0][0].branches[0]
    assert tokenizer.decode(first.ids[first.supervised]).startswith("Making crepes is an easy")

    glaive = prepare(shared_data / "glaive_toolcall_en_demo.json", tokenizer, DataSettings(
        chat_template="chatml", assistant_only=True
    ))  # fmt: skip
    assert glaive.report.used == 300
    assert glaive.report.notes() == ["read as ShareGPT: column `conversations` with keys `from`, `value`"]
    calls = sum(
        tokenizer.decode(part.branches[0].ids[part.branches[0].supervised]).count("<tool_call>")
        for (part,) in glaive.samples
    )
    assert calls == 211
    with pytest.raises(DataError, match="leaves tool calls out"):
        prepare(shared_data / "glaive_toolcall_en_demo.json", tokenizer, DataSettings())

    with pytest.raises(DataError, match="train them with KTO"):
        prepare(shared_data / "kto_en_demo.json", tokenizer, DataSettings())
    everything = prepare(shared_data / "kto_en_demo.json", tokenizer, DataSettings(format="messages"))
    assert everything.report.used == 300
    with pytest.raises(DataError, match="train them with DPO"):
        prepare(shared_data / "dpo_en_demo.json", tokenizer, DataSettings())
    mapped = DataSettings(column_map={"question": "prompt", "answer": "completion"}, max_length=2000)
    assert prepare(shared_data / "gsm8k_train.jsonl", tokenizer, mapped).report.used == 7473
    lines = (json.loads(line) for line in (shared_data / "gsm8k_train.jsonl").open())
    rows = [{"prompt": r["question"], "completion": " " + r["answer"]} for r, _ in zip(lines, range(500), strict=False)]
    assert run(rows).report.boundary_moved.count == 0


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, posttrain.data.prepare; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "pyarrow", "jinja2"} & set(found.stdout.split())


def test_arrays_are_compact() -> None:
    branch = run(ROWS).samples[0][0].branches[0]
    assert (branch.ids.dtype, branch.supervised.dtype) == (np.int32, bool)


def test_formats_are_those_of_rows_that_are_used() -> None:
    rows = [{"text": "a"}, {"text": " "}, {"prompt": "a", "completion": ""}, {"instruction": "a", "output": ""}]
    report = prepare(rows, chatml_tokenizer(), DataSettings(on_bad_row="skip")).report
    assert report.formats == {"read as text: column `text`": 1}
    long = [{"prompt": "x " * 40, "completion": "y"}, {"text": "a"}]
    assert prepare(long, chatml_tokenizer(), DataSettings(max_length=8)).report.formats == report.formats
