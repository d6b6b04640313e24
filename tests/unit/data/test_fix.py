"""`posttrain data fix`: named repairs, what they leave alone, and that only copies are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.data.change import fix
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError
from tests.doctor_files import pair, plain, row, write

S = DataSettings()


def misspelt(question: str = "Hi") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "Assitant", "content": "Hello"}], "id": 7}


def mended(tmp_path: Path, rows: list[Any], *rules: str, **data: Any) -> tuple[list[Any], dict[str, Any]]:
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    before = source.read_bytes()
    report = fix(str(source), out, DataSettings(**data), rules)
    assert source.read_bytes() == before
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(lines) == report["written"]
    return lines, report


def test_a_role_is_renamed_and_nothing_else(tmp_path: Path) -> None:
    rows = [plain(1)[0], misspelt(), plain(1)[0], row("Hi", "A\x08B"), {"x": 1}]
    out, report = mended(tmp_path, rows, "rename-role:assitant=assistant")
    assert out == [rows[0], {**row("Hi", "Hello"), "id": 7}, *rows[2:]]
    assert report["rules"] == {
        "rename-role:assitant=assistant": {"count": 1, "first": [f"{tmp_path}/in.jsonl:2"]}
    }  # fmt: skip
    assert report["unusable"] == 1


def test_sharegpt_and_pairs(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "humann", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": [{"role": "humann", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]},
    ]  # fmt: skip
    out, report = mended(tmp_path, rows, "rename-role:humann=human")
    assert out[0]["conversations"][0]["from"] == "human"
    assert out[1]["prompt"][0]["role"] == "human"
    assert report["unusable"] == 0


def test_rules_are_chosen_by_name(tmp_path: Path) -> None:
    human = {"messages": [{"role": "human", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
    rows = [row("Hi", "a"), row("Hi", "a"), row("Hi", "A\x08B"), {"x": 1}, human, pair("?", "a", "a")]
    kept = {
        "drop-duplicates": [0, 2, 3, 4, 5], "drop-unusable": [0, 1, 2, 4, 5], "drop-equal-pairs": [0, 1, 2, 3, 4],
    }  # fmt: skip
    for rule, numbers in kept.items():
        out, report = mended(tmp_path, rows, rule)
        assert out == [rows[number] for number in numbers]
        assert report["rules"][rule]["count"] == 1
    out, _ = mended(tmp_path, rows, "strip-control-characters")
    assert out == [*rows[:2], row("Hi", "AB"), *rows[3:]]
    out, _ = mended(tmp_path, rows, "rename-roles")
    assert out == [*rows[:4], row("Hi", "Hello"), rows[5]]
    out, report = mended(tmp_path, rows)
    assert out == [rows[0], row("Hi", "AB"), row("Hi", "Hello")]
    assert [rule["count"] for rule in report["rules"].values()] == [1, 1, 1, 1, 1]


def test_columns_are_renamed_first(tmp_path: Path) -> None:
    rows = [{"chat": misspelt()["messages"]}]
    out, report = mended(tmp_path, rows, "rename-role:assitant=assistant", column_map={"chat": "messages"})
    assert out == [row("Hi", "Hello")]
    assert report["rules"]["renamed_columns"]["count"] == 1
    kept, _ = mended(tmp_path, rows, "rename-role:assitant=assistant")
    assert kept == [{"chat": row("Hi", "Hello")["messages"]}], "under its own name"


@pytest.mark.parametrize(
    ("rule", "says", "hint"),
    [
        ("rename-role:asistent=assistant", "no message has that role", "did you mean assitant?"),
        ("rename-role:narrator=user", "no message has that role", "roles there are: assitant, user"),
        ("rename-role:assitant=asistant", "'asistant' is no role either", "did you mean assistant?"),
        ("rename-role:assitant", "is not of the form rename-role:OLD=NEW", "rename-role:assitant=assistant"),
        ("drop-duplicate", "there is no such repair", "did you mean drop-duplicates?"),
        ("everything", "there is no such repair", "known: drop-unusable"),
    ],
)
def test_mistakes_in_rules(tmp_path: Path, rule: str, says: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        mended(tmp_path, [misspelt()], rule)
    assert hint in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_lines_that_cannot_be_kept(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(misspelt()) + "\nnope\n")
    with pytest.raises(DataError) as caught:
        fix(str(source), tmp_path / "out.jsonl", S, ["rename-role:assitant=assistant"])
    assert caught.value.code == "E-DATA-0002"
    assert caught.value.hint == "--rule drop-unusable leaves such lines out"
    report = fix(str(source), tmp_path / "out.jsonl", S, ["rename-role:assitant=assistant", "drop-unusable"])
    assert (report["written"], report["rules"]["drop-unusable"]["count"]) == (1, 1)


def test_the_command_that_the_check_names_is_the_one_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my train.jsonl", [{"chat": misspelt()["messages"]}, {"chat": plain(1)[0]["messages"]}])
    assert main(["data", "check", "my train.jsonl", "--map", "chat=messages"]) == 3
    command = (
        "posttrain data fix 'my train.jsonl' --rule rename-role:assitant=assistant --map chat=messages"
    )  # fmt: skip
    assert f'  = did you mean "assistant"?  fix: {command}\n' in capsys.readouterr().out
    words = ["data", "fix", "my train.jsonl", "--rule", "rename-role:assitant=assistant", "--map", "chat=messages"]
    assert main(words) == 0
    assert capsys.readouterr().out == (
        "✔ fixed    my train.fixed.jsonl 2 rows written: rename-role:assitant=assistant 1 row; renamed_columns 2 rows\n"
        "✔ report   my train.fixed.report.json\n"
    )
    assert main(["data", "check", "my train.fixed.jsonl", "--strict"]) == 0
    assert json.loads(Path("my train.fixed.report.json").read_text())["written"] == 2
    assert main(words) == 2, "a copy is not written over either"
    assert main([*words, "--force", "--json"]) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["-o", "in.jsonl", "--force"], "in.jsonl is what is read"),
        (["-o", "out.csv"], "a repaired copy is written as .jsonl or .json"),
        (["-o", "none/out.jsonl"], "there is no folder none"),
        (["--report", "none/r.json"], "there is no folder none"),
        (["--report", "in.jsonl"], "in.jsonl is what is read"),
    ],
)
def test_where_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", [misspelt()])
    before = source.read_bytes()
    assert main(["data", "fix", "in.jsonl", *more]) == 2
    assert says in capsys.readouterr().err
    assert source.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
