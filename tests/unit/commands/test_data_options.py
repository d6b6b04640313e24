"""What every verb of `posttrain data` takes, and what is found out before any work is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from tests.doctor_files import plain, write
from tests.tiny_tokenizers import chatml_tokenizer

MAP = ["--map", "question=prompt,answer=completion"]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i} + {i}?", "answer": f" {2 * i}", "topic": i % 3} for i in range(9)]
    write(tmp_path / "asked.jsonl", [*rows, rows[0]])
    write(tmp_path / "train.jsonl", plain(5))


def data(*words: str) -> int:
    return main(["data", *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    try:
        ended: object = data(*words)
    except SystemExit as stopped:  # argparse
        ended = stopped.code
    assert ended == code
    said = capsys.readouterr().err
    assert "E-INTERNAL" not in said
    return said


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_columns_are_renamed_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert data("convert", "asked.jsonl", *MAP, "--to", "messages", "-o", "out.jsonl") == 0
    assert rows("out.jsonl")[1]["messages"][1] == {"role": "assistant", "content": " 2"}
    assert data("dedup", "asked.jsonl", *MAP, "-o", "once.jsonl") == 0
    assert rows("once.jsonl") == rows("asked.jsonl")[:9], "rows as they are"
    assert data("split", "asked.jsonl", *MAP, "--val", "0.3", "-o", "parts") == 0
    assert data("split", "asked.jsonl", "--map", "question=prompt,answer=completion,topic=kind", "--by-group", "kind",
                "--val", "0.3", "-o", "groups") == 0  # fmt: skip
    assert len({row["topic"] for row in rows("groups/val.jsonl")}) == 1
    capsys.readouterr()
    assert data("stats", "asked.jsonl", *MAP, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 10
    chatml_tokenizer().save_pretrained("model")
    assert data("tokens", "asked.jsonl", *MAP, "--model", "model") == 0


@pytest.mark.parametrize("verb", ["check", "stats", "convert --to messages -o out.jsonl", "dedup -o out.jsonl",
                                  "split -o parts", "tokens --model model"])  # fmt: skip
def test_a_column_that_no_row_has(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    name, *more = verb.split()
    said = refused(capsys, name, "asked.jsonl", *more, "--map", "qestion=prompt,answer=completion")
    assert said == (
        "E-CONFIG-0001 --map qestion=prompt: no row has a column 'qestion'\n  = did you mean question?\n"
    )  # fmt: skip
    assert "columns: question, answer, topic" in refused(capsys, name, "asked.jsonl", *more, "--map", "zzz=prompt")
    assert not Path("out.jsonl").exists()


def test_a_column_of_the_last_row_only(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("late.jsonl"), [*plain(3), {"question": "Q?", "answer": "A"}])
    assert data("check", "late.jsonl", *MAP) == 0
    assert data("check", "train.jsonl", "late.jsonl", *MAP) == 0


def test_stats_with_another_template(capsys: pytest.CaptureFixture[str]) -> None:
    chatml_tokenizer().save_pretrained("model")
    totals = []
    for more in ([], ["--chat-template", "{% for m in messages %}{{ m.content }} {% endfor %}"]):
        assert data("stats", "train.jsonl", "--model", "model", "--json", *more) == 0
        totals.append(json.loads(capsys.readouterr().out)["tokens"]["total"])
    assert totals[1] < totals[0]
    assert "needs --model" in refused(capsys, "stats", "train.jsonl", "--chat-template", "chatml")
    assert "needs --model" in refused(capsys, "check", "train.jsonl", "--chat-template", "chatml")


@pytest.mark.parametrize("flag", ["--chat-template", "--template"])
def test_one_name_for_the_template(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    chatml_tokenizer().save_pretrained("model")
    assert "no chat template is called 'chatlm'" in refused(
        capsys, "tokens", "train.jsonl", "--model", "model", flag, "chatlm"
    )


def test_commands_in_hints_say_all_that_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert data("check", "asked.jsonl", *MAP, "--format", "prompt-completion", "--set", "near_rows=0") == 0
    command = (
        "posttrain data check asked.jsonl --format prompt-completion --map question=prompt,answer=completion "
        "--set near_rows=0 --fix OUT drops them"
    )
    assert f"  = {command}\n" in capsys.readouterr().out
    data("check", "asked.jsonl", *MAP, "--format", "prompt-completion", "--set", "near_rows=0", "--json")
    assert json.loads(capsys.readouterr().out)["findings"][0]["fix"] == command
    write(Path("my val.jsonl"), [{"question": "Q?", "answer": ""}])
    assert data("check", "asked.jsonl", *MAP, "--val", "my val.jsonl") == 3
    said = capsys.readouterr().out
    assert "posttrain data check 'my val.jsonl' --map question=prompt,answer=completion says more" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("check train.jsonl --report none/r.json", "--report none/r.json: there is no folder none\n  = mkdir -p none"),
        ("check train.jsonl --report .", "--report . is a folder"),
        ("check train.jsonl --report train.jsonl", "is what is read; it is never written over"),
        ("check train.jsonl --max-errors -1", "argument --max-errors: -1 is less than 0"),
        ("check train.jsonl --max-errors few", "argument --max-errors: invalid whole number value: 'few'"),
        ("split train.jsonl -o parts --seed -1", "argument --seed: -1 is less than 0"),
        ("split train.jsonl -o train.jsonl", "no such folder can be made"),
        ("split train.jsonl -o . --force", "train.jsonl is what is read"),
        ("convert train.jsonl --to sharegpt -o train.jsonl --force", "train.jsonl is what is read"),
        ("dedup train.jsonl -o train.jsonl --force", "train.jsonl is what is read"),
        ("dedup train.jsonl -o none/a.jsonl", "there is no folder none"),
        ("tokens train.jsonl --model model --html none/a.html", "--html none/a.html: there is no folder none"),
    ],
)
def test_found_out_before_any_work(capsys: pytest.CaptureFixture[str], words: str, says: str) -> None:
    before = Path("train.jsonl").read_bytes()
    assert says in refused(capsys, *words.split())
    assert Path("train.jsonl").read_bytes() == before


def test_near_duplicates_among_all(capsys: pytest.CaptureFixture[str]) -> None:
    notes = []
    for words in ("--near 3", "--set near_rows=3", "--near all", "--set near_rows=3 --near all", "--near 0"):
        data("check", "train.jsonl", "--json", *words.split())
        found = json.loads(capsys.readouterr().out)["findings"]
        notes.append([item["fix"] for item in found if item["code"] == "W-DATA-0119"])
    asked = "--near all looks at all of them"
    assert notes == [[asked], [asked], [], [], ["--near 50000"]]
    assert "argument --near: invalid" in refused(capsys, "check", "train.jsonl", "--near", "some")
