"""What `--policy skip` leaves out is listed, by every verb, with its place, code and message; and hints name the flags
of the command that was typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from tests.doctor_files import pair, plain, rated, row, write
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

EMPTY = {"prompt": "Q?", "completion": ""}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}
CALLING = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [CALL]}]}
VERBS = {
    "convert": ("convert in.jsonl --to messages -o out.jsonl", "out.report.json"),
    "dedup": ("dedup in.jsonl -o out.jsonl", "out.report.json"),
    "dedup near": ("dedup in.jsonl -o out.jsonl --near", "out.report.json"),
    "split": ("split in.jsonl -o parts --val 0.3", "parts/split.report.json"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(one) for one in [*plain(5), EMPTY, *plain(5, start=5)]]
    Path("in.jsonl").write_text("\n".join(["nope", *rows, '{"x": 1}']))
    return tmp_path


def data(words: str) -> int:
    return main(["data", *words.split()])


def report(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text("utf-8"))


def assert_listed(rows: list[dict[str, Any]]) -> None:
    assert [(one["row"], one["code"]) for one in rows] == [
        ("in.jsonl:1", "E-DATA-0002"), ("in.jsonl:7", "E-DATA-0013"), ("in.jsonl:13", "E-DATA-0010")
    ]  # fmt: skip
    assert rows[1]["message"].startswith('in.jsonl:7  "completion" is empty')
    assert rows[1]["hint"] == "fill it or drop the row (--policy skip drops and counts such rows)"


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_skipped_is_listed_beside_what_is_written(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, path = VERBS[verb]
    assert data(f"{words} --policy skip") == 0
    found = report(path)
    assert (found["schema_version"], found["source"], found["skipped"]) == (1, "in.jsonl", 3)
    assert_listed(found["skipped_rows"])
    assert f"! skipped  3 rows, listed in {path}\n" in capsys.readouterr().out
    assert data(f"{words} --policy skip --force --report mine.json --json") == 0
    assert_listed(report("mine.json")["skipped_rows"])
    said = json.loads(capsys.readouterr().out)
    assert (said["skipped"], said["report"]) == (3, "mine.json")


@pytest.mark.parametrize("verb", VERBS)
def test_no_report_without_need_and_none_out_of_date(verb: str) -> None:
    words, path = VERBS[verb]
    assert data(f"{words} --policy skip") == 0
    write(Path("in.jsonl"), plain(9))
    assert data(f"{words} --policy skip --force") == 0
    assert report(path)["skipped_rows"] == []
    Path(path).unlink()
    assert data(f"{words} --policy skip --force") == 0
    assert not Path(path).exists()


def test_what_a_format_cannot_hold_is_listed_too() -> None:
    write(Path("in.jsonl"), [row("Q?", "A"), pair("Q?", "a", "b")])
    assert data("convert in.jsonl --to messages -o out.jsonl --policy skip") == 0
    (found,) = report("out.report.json")["skipped_rows"]
    assert (found["row"], found["code"]) == ("in.jsonl:2", "E-DATA-0052")
    assert "its rejected answer would be lost" in found["message"]


def test_files_that_are_no_reports_are_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.report.json").write_text("mine")
    assert data("convert in.jsonl --to messages -o out.jsonl --policy skip") == 2
    assert "there is such a file already, and it is no report" in capsys.readouterr().err
    assert data("split in.jsonl -o parts --policy skip --report parts/train.jsonl") == 2
    assert Path("out.report.json").read_text() == "mine"
    assert not Path("out.jsonl").exists()


def test_stats_say_what_they_leave_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert data("stats in.jsonl --policy skip") == 0
    said = capsys.readouterr().out
    assert '! skipped  E-DATA-0013 in.jsonl:7  "completion" is empty\n' in said
    assert said.count("! skipped") == 3
    assert data("stats in.jsonl --policy skip --json") == 0
    assert_listed(json.loads(capsys.readouterr().out)["skipped_rows"])
    assert data("stats in.jsonl --policy skip --report r.json") == 0
    assert_listed(report("r.json")["skipped_rows"])
    assert "! skipped  3 rows, listed in r.json\n" in capsys.readouterr().out
    Path("in.jsonl").write_text('{"text": "a"}\n' + "nope\n" * 9)
    assert data("stats in.jsonl --policy skip") == 0
    assert "           and 4 more\n  = --report R.json lists them all\n" in capsys.readouterr().out
    assert data("stats in.jsonl --policy skip -v") == 0
    assert capsys.readouterr().out.count("! skipped") == 9


def test_stats_list_what_only_the_model_cannot_use(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    write(Path("in.jsonl"), [*plain(3), CALLING, EMPTY])
    assert data("stats in.jsonl --policy skip --model model --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["skipped"], found["tokens"]["skipped"]) == (3, 2, 1)
    assert sorted(one["row"] for one in found["skipped_rows"]) == ["in.jsonl:4", "in.jsonl:5"]
    assert sum(rows for *_, rows in found["histogram"]) == sum(found["formats"].values()) == 3
    assert data("stats in.jsonl --policy skip --model model --report r.json") == 0
    said = capsys.readouterr().out
    assert "in.jsonl: 3 rows, 2 skipped\n" in said
    assert "! skipped  2 rows, listed in r.json\n" in said


def test_stats_count_the_tokens_of_pairs_and_ratings(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = {
        "pairs.jsonl": [pair("Q?", "good", "very bad"), pair("R?", "a", "b")],
        "rated.jsonl": [rated("Q?", "good", True), rated("Q?", "bad", False)],
    }
    for name, written in rows.items():
        write(Path(name), written)
        assert data(f"stats {name} --model model --json") == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["data", "check", name, "--model", "model", "--json"]) in (0, 3)
        checked = json.loads(capsys.readouterr().out)["lengths"]
        assert found["tokens"]["row"]["p100"] == checked["longest"]
        assert sum(count for *_, count in found["histogram"]) == (4 if name == "pairs.jsonl" else 2)
        assert found["rows"] == 2
    assert found["tokens"]["trained"] == len("good") + len("bad") + 2


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("words", ["dedup in.jsonl -o out", "dedup in.jsonl --near -o out",
                                   "convert in.jsonl --to messages -o out"])  # fmt: skip
def test_a_file_without_a_row_is_not_written(words: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("in.jsonl"), [EMPTY, EMPTY])
    assert data(f"{words}.{suffix} --policy skip") == 3
    said = capsys.readouterr()
    assert f"E-DATA-0031 out.{suffix}: not a single row is left to write" in said.err
    assert "every row was skipped: without --policy skip it is said why" in said.err
    assert "✔" not in said.out
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl"]


def test_a_repair_that_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("in.jsonl"), [EMPTY, EMPTY, pair("Q?", "a", "a")])
    assert data("fix in.jsonl") == 3
    assert "E-DATA-0031 in.fixed.jsonl: not a single row is left to write" in capsys.readouterr().err
    assert data("check in.jsonl --fix out.jsonl --policy skip") == 3
    said = capsys.readouterr()
    assert "--fix out.jsonl was not written: nothing is left" in said.err
    assert "unusable rows left out: 2; pairs that choose what they reject left out: 1" in said.err
    write(Path("in.jsonl"), [EMPTY, EMPTY])
    assert data("check in.jsonl --fix out.jsonl --policy skip --json") == 3
    assert json.loads(capsys.readouterr().out)["fix"] is None
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl"]


HALF = {"prompt": "Q?", "completion": "\ud83d"}
HALF_A_TOOL = {**row("Q?", "A"), "tools": [{"name": "f", "description": "\ud83d"}]}
ASKED = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("verb", [*VERBS, "stats"])
def test_what_training_refuses_is_refused_by_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, _ = VERBS.get(verb, ("stats in.jsonl", ""))
    write(Path("in.jsonl"), [*plain(6), HALF, HALF_A_TOOL, ASKED])
    assert data(words) == 3
    assert "E-DATA-0024 in.jsonl:7" in capsys.readouterr().err
    assert data(words + " --policy skip --report r.json") == 0
    capsys.readouterr()
    listed = [(one["row"], one["code"]) for one in report("r.json")["skipped_rows"]]
    assert listed == [("in.jsonl:7", "E-DATA-0024"), ("in.jsonl:8", "E-DATA-0024"), ("in.jsonl:9", "E-DATA-0022")]
    assert main(["data", "check", "in.jsonl", "--policy", "skip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usable"] == 6


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("convert one.jsonl --to messages -o out.jsonl", "(--policy skip drops and counts such rows)"),
        ("stats one.jsonl", "(--policy skip drops and counts such rows)"),
        ("check one.jsonl", "(--policy skip drops and counts such rows)"),
    ],
)
def test_hints_name_the_flag(words: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("one.jsonl"), [EMPTY])
    assert data(words) == 3
    said = capsys.readouterr()
    assert hint in said.out + said.err
    assert "on_bad_row" not in said.out + said.err


def test_hints_of_reports_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("one.jsonl"), [EMPTY])
    assert data("check one.jsonl --json") == 3
    said = capsys.readouterr().out
    assert "on_bad_row" not in said
    assert "--policy skip" in json.loads(said)["bad_rows"][0]["hint"]


def test_hints_of_training_name_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    write(Path("one.jsonl"), [EMPTY])
    Path("run.yaml").write_text(
        "model: {name: model}\ndataset: {path: one.jsonl}\ntraining: {max_steps: 1, bf16: false}\n"
    )
    assert main(["train", "run.yaml"]) == 3
    assert "(--set dataset.on_bad_row=skip drops and counts such rows)" in capsys.readouterr().err
