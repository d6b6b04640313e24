"""The repaired copy: each rule, its count, and that nothing but the copy is ever written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.data.doctor.repair import repair
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError
from tests.doctor_files import codes, examine, finding, pair, plain, rated, row, write


def repaired(tmp_path: Path, rows: list[Any], **data: Any) -> tuple[list[Any], dict[str, int]]:
    out = tmp_path / "out.jsonl"
    counts = repair([write(tmp_path / "in.jsonl", rows)], out, DataSettings(**data))
    changed = {rule: count for rule, count in counts.items() if count and rule != "written"}
    lines = out.read_bytes().splitlines()
    assert len(lines) == counts["written"]
    return [json.loads(line) for line in lines], changed


def test_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    assert repaired(tmp_path, plain(5)) == (plain(5), {})
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "in.jsonl").read_text()


def test_each_rule(tmp_path: Path) -> None:
    human = {"messages": [{"role": "human", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "id": 7}
    rows = [*plain(2), plain(1)[0], {"x": 1}, row("Hi", "A\x08B"), human]
    out, changed = repaired(tmp_path, rows)
    assert out == [*plain(2), row("Hi", "AB"), {**row("Hi", "Hello"), "id": 7}]
    assert changed == {
        "dropped_unusable": 1, "dropped_duplicates": 1, "stripped_control_characters": 1, "renamed_roles": 1
    }  # fmt: skip
    assert codes(tmp_path / "out.jsonl") == ["W-DATA-0104"]  # two answers to one prompt: that is not for us to decide


def test_equal_pairs_and_columns(tmp_path: Path) -> None:
    assert repaired(tmp_path, [pair("Q?", "a", "a"), pair("Q?", "a", "b")])[1] == {"dropped_equal_pairs": 1}
    (tmp_path / "out.jsonl").unlink()
    rows = [{"question": "1?", "answer": "1."}]
    out, changed = repaired(tmp_path, rows, column_map={"question": "prompt", "answer": "completion"})
    assert (out, changed) == ([{"prompt": "1?", "completion": "1."}], {"renamed_columns": 1})


def test_what_becomes_a_duplicate_by_repair_is_dropped_too(tmp_path: Path) -> None:
    assert repaired(tmp_path, [row("Hi", "AB"), row("Hi", "A\x08B")])[1] == {"dropped_duplicates": 1}


def test_as_an_array_and_without_halves_of_surrogate_pairs(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "half \\ud800 of one"}\n{"text": "whole ☃", "id": "\\ud800"}\n', "utf-8")
    counts = repair([source], tmp_path / "out.json", DataSettings())
    text = (tmp_path / "out.json").read_text("utf-8")
    assert json.loads(text) == [{"text": "whole ☃", "id": "\ud800"}]
    assert counts["dropped_unusable"] == 1


def test_no_copy_is_written_of_a_file_that_breaks_off(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('prompt,completion\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match="broken CSV"):
        repair([source], tmp_path / "out.jsonl", DataSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_bad_lines_and_broken_ends(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "a"}\nnope\n{"text": "\xff"}\n{"text": "b"}\n{"te')
    counts = repair([source], tmp_path / "out.jsonl", DataSettings())
    assert (counts["written"], counts["dropped_unusable"]) == (2, 3)


@pytest.mark.parametrize("name", ["in.jsonl", "there.jsonl", "out.csv", "none/out.jsonl"])
def test_where_a_copy_is_not_written(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in.jsonl", plain(2))
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="--fix"):
        repair([source], tmp_path / name, DataSettings())
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert source.read_text().count("\n") == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", plain(9))
    written = iter(range(5))
    monkeypatch.setattr("posttrain.data.writing._line", lambda row: str(next(written)))
    with pytest.raises((StopIteration, RuntimeError)):
        repair([source], tmp_path / "out.jsonl", DataSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


ESCAPES = {
    "\x1b[31mred\x1b[0m": "red",
    "\x1b[1;38;5;208mbold\x1b[m and \x1b[4munder\x1b[24m": "bold and under",
    "\x1b[2K\x1b[1Gdone\x1b[?25h": "done",
    "\x1b]0;a title\x07text": "text",
    "\x1b]8;;https://a.b/\x1b\\a link\x1b]8;;\x1b\\": "a link",
    "\x1b(Btext\x1b7\x1b8": "text",
    "a list[31m] stays": "a list[31m] stays",
    "\x1bHello": "Hello",
    "\x1b]open\nHello": "]open\nHello",
}


def test_escape_sequences_go_whole(tmp_path: Path) -> None:
    rows = [row(f"Log {number}?", text) for number, text in enumerate(ESCAPES)]
    out, changed = repaired(tmp_path, rows)
    assert [one["messages"][1]["content"] for one in out] == [*ESCAPES.values()]
    assert changed == {"stripped_control_characters": len(ESCAPES) - 1}


def test_words_that_a_control_character_parts_stay_apart(tmp_path: Path) -> None:
    parted = {
        "\x0b": "\n",
        "\x0c": "\n",
        "\x85": "\n",
        "\x1c": " ",
        "\x1f": " ",
        "\u200b": "",
        "\ufeff": "",
        "\x00": "",
    }
    rows = [row(f"Question {n}?", f"one{character}two") for n, character in enumerate(parted)]
    out, changed = repaired(tmp_path, rows)
    assert [one["messages"][1]["content"] for one in out] == [f"one{instead}two" for instead in parted.values()]
    assert changed == {"stripped_control_characters": len(parted)}
    assert "W-DATA-0112" not in codes(tmp_path / "out.jsonl")


MINE = {"id": "a\u200bb\x0c", "source": ["x\x85y", {"from": "\x00"}], "title": "\ufeffT"}


@pytest.mark.parametrize(
    "trained",
    [row("Hi\x08", "A\x08B"), {"prompt": "Hi\x08", "completion": "A\x08B"},
     {"instruction": "Hi\x08", "output": "A\x08B"}, {"text": "A\x08B"}, pair("Hi\x08", "A\x08B", "C"),
     {"prompt": "Hi", "completion": "A\x08B", "label": True},
     {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A\x08B"}], "system": "S\x08"}],
)  # fmt: skip
def test_columns_of_the_users_own_stay_as_they_are(trained: Any, tmp_path: Path) -> None:
    (out,), changed = repaired(tmp_path, [{**trained, **MINE}])
    assert out == {**json.loads(json.dumps(trained).replace("\\b", "")), **MINE}
    assert changed == {"stripped_control_characters": 1}
    (tmp_path / "out.jsonl").unlink()
    clean = json.loads(json.dumps(trained).replace("\\b", ""))
    assert repaired(tmp_path, [{**clean, **MINE}]) == ([{**clean, **MINE}], {})


def test_columns_that_another_format_reads_are_the_users_own_here(tmp_path: Path) -> None:
    rows = [{**row("Hi", "A"), "input": "x\x0cy", "output": "\x00", "text": "a\u200bb"}]
    assert repaired(tmp_path, rows) == (rows, {})


def test_plain_text_under_its_own_name(tmp_path: Path) -> None:
    out, _ = repaired(tmp_path, [{"body": "a\x0cb", "text": "c\x0cd"}], text_field="body")
    assert out == [{"body": "a\nb", "text": "c\x0cd"}]


def test_ranges_count_characters_so_their_texts_stay_as_they_are(tmp_path: Path) -> None:
    ranged = row("Hi", "A\x08B and C")
    ranged["messages"][1]["train_detail"] = [{"begin_offset": 0, "end_offset": 2, "train": False}]
    assert repaired(tmp_path, [ranged]) == ([ranged], {})


@pytest.mark.parametrize("label", [True, False])
def test_few_ratings_that_are_all_alike(label: bool) -> None:
    """KTO has nothing to tell apart, however many there are; of one alone nothing can be said."""
    few = [rated(f"{i}?", f"{i}.", label) for i in range(2)]
    found = finding(examine(few), "E-DATA-0063")
    assert (found.count, found.sentence) == (2, f"all 2 ratings say {'good' if label else 'bad'}")
    assert codes(few[:1]) == []
    assert codes([*few, rated("2?", "2.", not label)]) == []


def test_counts_of_a_file_that_breaks_off_do_not_look_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = write(tmp_path / "a.jsonl", plain(3)), tmp_path / "b.json"
    broken.write_text('[{"prompt": "a", "completion": "b"}, {"prompt": ')
    said = "; nothing is known of the rest, which cannot be read"
    assert main(["data", "check", str(broken)]) == 3
    assert f"! data     b.json 1 row{said}\n" in capsys.readouterr().out
    assert main(["data", "check", str(whole), "--val", str(broken), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["validation"]["unread"] is True
    out = tmp_path / "c.jsonl"
    assert main(["data", "check", str(whole), "--val", str(broken), "--fix", str(out)]) == 3
    shown = capsys.readouterr().out
    assert "✔ data     a.jsonl 3 rows\n" in shown
    assert f"! val      b.json 1 row: 1 usable{said}\n" in shown
    assert out.exists(), "what is to be trained on can be read"
