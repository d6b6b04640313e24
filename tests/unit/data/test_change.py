"""Files made into others: nothing lost on the way, nothing on both sides of a split, nothing half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.cli import main
from posttrain.data.change import convert, dedup, split, stats
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from tests.doctor_files import codes, plain, row

S = DataSettings()
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two plus two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Café? 🙂"},
        {"role": "assistant", "content": "Yes,\nplease."},
    ]
}
LAST = {"messages": [{**turn, "train": False} if turn["content"] == "Four." else turn for turn in CHAT["messages"]]}
"""Of which the last answer alone is trained."""
CALLS = {
    "messages": [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
            "name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("row", [CHAT, CALLS], ids=["chat", "calls"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_to_sharegpt_and_back(row: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    there, back = tmp_path / f"a.{suffix}", tmp_path / "b.jsonl"
    assert convert([row, {**row, "id": 7}], "sharegpt", there, S) == {"written": 2, "skipped": 0}
    convert(str(there), "messages", back, S)
    first, second = lines(back)
    assert first["messages"] == row["messages"]
    assert second["messages"] == row["messages"]
    assert int(second["id"]) == 7


def test_to_alpaca_and_back(tmp_path: Path) -> None:
    convert([LAST], "alpaca", tmp_path / "a.jsonl", S)
    (row,) = lines(tmp_path / "a.jsonl")
    assert row == {"system": "Be brief.", "instruction": "Café? 🙂", "input": "", "output": "Yes,\nplease.",
                   "history": [["Two plus two?", "Four."]]}  # fmt: skip
    convert(str(tmp_path / "a.jsonl"), "messages", tmp_path / "b.jsonl", S)
    assert lines(tmp_path / "b.jsonl")[0]["messages"] == LAST["messages"]


def test_to_prompt_completion(tmp_path: Path) -> None:
    rows = [LAST, {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "b", "output": "c"}]
    convert(rows, "prompt-completion", tmp_path / "a.jsonl", S)
    chat, text, alpaca = lines(tmp_path / "a.jsonl")
    assert chat == {"prompt": LAST["messages"][:-1], "completion": LAST["messages"][-1:]}
    assert text == {"prompt": "a", "completion": "b"}
    assert alpaca["prompt"] == [{"role": "user", "content": "a\n\nb"}]


@pytest.mark.parametrize(
    ("row", "to"),
    [({"text": "a"}, "messages"), (CALLS, "alpaca"), ({"prompt": "a", "chosen": "b", "rejected": "c"}, "messages"),
     ({"messages": [{"role": "assistant", "content": "x"}]}, "prompt-completion")],
)  # fmt: skip
def test_what_a_format_cannot_hold(row: dict[str, Any], to: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        convert([row], to, tmp_path / "a.jsonl", S)
    assert caught.value.code == "E-DATA-0052"
    assert list(tmp_path.iterdir()) == []
    skip = DataSettings(on_bad_row="skip")
    other = {"instruction": "a", "output": "b"}
    assert convert([row, other], to, tmp_path / "a.jsonl", skip) == {"written": 1, "skipped": 1}
    with pytest.raises(ConfigError, match="known: messages"):
        convert([row], "xml", tmp_path / "a.jsonl", S)


questions = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(questions, st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_is_a_partition_and_leaks_nothing(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    rows = [{"prompt": question, "completion": answer, "n": n} for n, (question, answer) in enumerate(pairs)]
    groups = {question for question, _ in pairs}
    if len(groups) == 1:
        with pytest.raises(DataError, match="cannot be split so"):
            split(rows, share, seed, folder, S)
        return
    try:
        counts = split(rows, share, seed, folder, S)
    except DataError:  # the nearest share of so few groups is none or all
        assume(False)
    train, val = lines(folder / "train.jsonl"), lines(folder / "val.jsonl")
    assert sorted(row["n"] for row in train + val) == list(range(len(rows)))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in val}
    assert (counts["train"], counts["val"], counts["groups"]) == (len(train), len(val), len(groups))


def test_a_split_is_near_its_share_and_depends_on_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a", "topic": n % 50} for n in range(1000)]
    chosen = []
    for seed in (0, 0, 1):
        assert split(rows, 0.1, seed, tmp_path, S)["val"] == 100
        chosen.append([row["prompt"] for row in lines(tmp_path / "val.jsonl")])
    assert chosen[0] == chosen[1] != chosen[2]
    split(rows, 0.1, 0, tmp_path, S, by_group="topic")
    assert {row["topic"] for row in lines(tmp_path / "val.jsonl")}.isdisjoint(
        {row["topic"] for row in lines(tmp_path / "train.jsonl")}
    )
    with pytest.raises(ConfigError, match="no such column"):
        split(rows, 0.1, 0, tmp_path, S, by_group="theme")
    with pytest.raises(ConfigError, match="no share"):
        split(rows, 1.5, 0, tmp_path, S)


def test_dedup(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a ", "completion": "b"},
        {"prompt": "a", "completion": "c"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    assert dedup(rows, tmp_path / "a.jsonl", S) == {"written": 2, "dropped": 2, "skipped": 0}
    assert lines(tmp_path / "a.jsonl") == [rows[0], rows[2]]
    assert dedup(rows, tmp_path / "b.jsonl", S, by_prompt=True)["written"] == 1


SAME = {
    "text": {"prompt": "Two plus two?", "completion": " Four."},
    "messages": row("Two plus two?", "Four."),
    "alpaca": {"instruction": "Two plus two?", "input": "", "output": "Four."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]},
    "cut": {"prompt": [{"role": "user", "content": "Two plus two?"}],
            "completion": [{"role": "assistant", "content": "Four."}]},
}  # fmt: skip
CHATS = {
    "messages": CHAT,
    "cut": {"prompt": CHAT["messages"][:-1], "completion": CHAT["messages"][-1:]},
    "cut early": {"prompt": CHAT["messages"][:2], "completion": CHAT["messages"][2:]},
}


@pytest.mark.parametrize("same", [SAME, CHATS], ids=["question", "chat"])
def test_one_conversation_in_several_formats_is_one(same: dict[str, Any], tmp_path: Path) -> None:
    rows = [*same.values()]
    assert dedup(rows, tmp_path / "a.jsonl", S)["written"] == 1
    others = plain(40)
    for seed in range(5):
        split([*rows, *others], 0.3, seed, tmp_path, S)
        train, val = lines(tmp_path / "train.jsonl"), lines(tmp_path / "val.jsonl")
        assert sum(one in train for one in rows) in (0, len(rows))
        assert len(train) + len(val) == len(rows) + 40
    for one in rows:
        for other in rows:
            assert "E-DATA-0061" in codes([one], [other])
    assert codes(rows)[0] == "W-DATA-0101"


YAML = ["a:\n  b: 1\n  c: 2", "a:\n  b: 1\nc: 2", "a:\n b: 1\n c: 2", "a:\n  b: 1\n\tc: 2", "a: b: 1 c: 2"]


def test_white_space_inside_an_answer_counts(tmp_path: Path) -> None:
    rows = [row("Write YAML.", text) for text in YAML]
    assert dedup(rows, tmp_path / "a.jsonl", S)["dropped"] == 0
    assert dedup([*rows, row("Write YAML.", YAML[0] + "\n")], tmp_path / "a.jsonl", S)["dropped"] == 1
    asked = [row(f"What is {text}?", "YAML.") for text in YAML]
    assert dedup(asked, tmp_path / "a.jsonl", S, by_prompt=True)["dropped"] == 0
    composed, decomposed = row("é?", "caf\u00e9"), row("é?", "cafe\u0301")
    assert dedup([composed, decomposed], tmp_path / "a.jsonl", S)["dropped"] == 0


def test_stats() -> None:
    found = stats([CHAT, {"prompt": "abc", "completion": "de"}], S)
    assert found["rows"] == 2
    assert found["characters"]["row"]["p0"] == 5
    assert (found["characters"]["prompt"]["p0"], found["characters"]["answer"]["p0"]) == (3, 2)
    assert found["turns"] == {"2": 1, "5": 1}
    assert sum(rows for *_, rows in found["histogram"]) == 2


def test_bars_are_no_narrower_than_a_character() -> None:
    histogram = stats([{"text": "a" * n} for n in (1, 2, 2, 3)], S)["histogram"]
    assert all(low < high for low, high, _ in histogram)
    assert sum(rows for *_, rows in histogram) == 4


def test_stats_count_what_is_said() -> None:
    silent = {"messages": [{"role": "system", "content": ""}, *row("abc", "de")["messages"]]}
    found = stats([CALLS, silent, {"text": "plain"}, {"input_ids": [1, 2]}], S)
    assert found["turns"] == {"1": 2, "3": 1, "4": 1}
    assert found["characters"]["prompt"] | {"p0": 0, "p100": 5} == found["characters"]["prompt"]  # "Add." and "3"
    assert found["characters"]["answer"]["p0"] == 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**CHAT, "n": n % 3}) + "\n" for n in range(6)))
    return path


def test_the_commands(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert main(["data", "convert", str(path), "--to", "sharegpt", "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 6, "skipped": 0, "out": str(out)}
    assert main(["data", "convert", str(path), "--to", "sharegpt", "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["data", "convert", str(path), "--to", "sharegpt", "-o", str(out), "--force"]) == 0
    assert main(["data", "dedup", str(path), "-o", str(tmp_path / "d.jsonl")]) == 0
    assert "5 dropped" in capsys.readouterr().out
    assert main(["data", "split", str(path), "--by-group", "n", "--val", "0.4", "-o", str(tmp_path / "s")]) == 0
    assert "4 train, 2 val" in capsys.readouterr().out
    assert main(["data", "stats", str(path)]) == 0
    assert "6 read as messages" in capsys.readouterr().out
    path.write_text("broken\n" + path.read_text())
    assert main(["data", "stats", str(path)]) == 3
    assert f"E-DATA-0002 {path}:1" in capsys.readouterr().err
    assert main(["data", "stats", str(path), "--policy", "skip"]) == 0
    assert "1 skipped" in capsys.readouterr().out
