"""Files that are read, or that hold something else, are never written over, however they are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.cli import main

ROWS = "".join(json.dumps({"prompt": f"Q{i}?", "completion": f"A{i}."}) + "\n" for i in range(6))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("a.jsonl", "other.jsonl", "d/train.jsonl", "d/b.jsonl"):
        (tmp_path / name).write_text(ROWS)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "check a.jsonl --fix o.jsonl --report o.jsonl",
        "check a.jsonl --fix o.jsonl --report ./o.jsonl",
        "check a.jsonl --report other.jsonl",
        "check d --report d/b.jsonl",
        "dedup a.jsonl -o o.jsonl --near --report o.jsonl",
        "fix a.jsonl -o o.jsonl --report o.jsonl",
        "dedup d -o d/train.jsonl --force",
        "dedup d/*.jsonl -o d/train.jsonl --force",
        "split d -o d --val 0.3 --force",
        "split d -o d --val 0.3",
        "convert d --to messages -o d/new.jsonl",
    ],
)
def test_it_is_refused_before_any_work(words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_text() for path in folder.rglob("*.jsonl")}
    assert main(["data", *words.split()]) == 2
    assert "E-CONFIG-0001" in capsys.readouterr().err
    assert {path: path.read_text() for path in folder.rglob("*.jsonl")} == before


def test_an_earlier_report_is_written_anew(folder: Path) -> None:
    for _ in range(2):
        assert main(["data", "check", "a.jsonl", "--report", "r.json"]) == 0
    assert json.loads((folder / "r.json").read_text())["rows"] == 6


def test_where_the_system_lets_nothing_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", "a.jsonl", "--to", "messages", "-o", "/proc/a.jsonl"]) == 2
    assert "E-CONFIG-0001 /proc/a.jsonl: nothing can be written there" in capsys.readouterr().err


def test_what_ends_one_file_is_not_said_of_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "d" / "c.json").write_text("null")
    (folder / "d" / "b.jsonl").write_text("nope\n" + ROWS)
    assert main(["data", "check", "d"]) == 3
    said = capsys.readouterr().out
    ends, _, bad = said.partition("E-DATA-0002 1 row cannot be used")
    assert "c.json:1: expected a JSON array of objects" in ends
    assert "b.jsonl:1:1" not in ends
    assert "b.jsonl:1:1" in bad


TABLES_CANNOT = {
    "a bare carriage return": [{"prompt": "d", "completion": "x\ry"}],
    "rows of several formats": [{"text": "Plain."}, {"messages": [{"role": "user", "content": "Hi"},
                                                                  {"role": "assistant", "content": "Hello"}]}],
}  # fmt: skip


def test_a_table_gives_text_that_looks_like_messages_back(folder: Path) -> None:
    row = {"prompt": '[{"role":"user","content":"x"}]', "completion": '[{"role":"user"}]'}
    (folder / "r.jsonl").write_text(json.dumps(row))
    assert main(["data", "dedup", "r.jsonl", "-o", "r.csv"]) == 0
    assert main(["data", "dedup", "r.csv", "-o", "again.jsonl"]) == 0
    assert json.loads((folder / "again.jsonl").read_text()) == row


@pytest.mark.parametrize("what", TABLES_CANNOT)
def test_what_a_table_would_not_give_back_is_not_written_as_one(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in ROWS.splitlines()][:2] + TABLES_CANNOT[what]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "dedup", "r.jsonl", "-o", "r.csv"]) == 3
    assert "E-DATA-0054" in capsys.readouterr().err
    assert not (folder / "r.csv").exists()
    assert main(["data", "dedup", "r.jsonl", "-o", "once.jsonl"]) == 0
    assert len((folder / "once.jsonl").read_text().splitlines()) == len(rows)
