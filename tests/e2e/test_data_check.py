"""`posttrain data check`, in process: what it prints, what it writes, how it ends; and the real files people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.data.formats import all_formats, detect
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from tests.doctor_files import pair, plain, row, write
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "train.jsonl", plain(40))


def check(*options: str | Path) -> int:
    return main(["data", "check", *map(str, options)])


def document(capsys: pytest.CaptureFixture[str], *options: str | Path) -> dict[str, Any]:
    check(*options, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_clean_file(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("train.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "✔ data     train.jsonl 40 rows"
    assert lines[1].strip() == "read as messages: column `messages` with keys `role`, `content`"
    assert lines[2].startswith("✔ length   median ")
    assert lines[3].startswith("✔ checked  0 errors, 0 warnings in ")
    assert len(lines) == 4


def test_warnings_are_fine_unless_strict(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(clean, [*plain(3), plain(1)[0]])
    assert check("train.jsonl") == 0
    said = capsys.readouterr().out
    assert "! W-DATA-0101 1 row says the same as an earlier one (25 %) (first: train.jsonl:4)" in said
    assert "  = posttrain data check train.jsonl --fix OUT drops them" in said
    assert check("train.jsonl", "--strict") == 3


def test_errors_are_exit_3_and_shown_with_the_row(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean.write_text('{"messages": [{"role": "assitant", "content": "Hi"}]}\n' + json.dumps(plain(1)[0]) + "\n")
    assert check("train.jsonl") == 3
    said = capsys.readouterr().out
    assert "! data     train.jsonl 2 rows: 1 usable, 1 not" in said
    assert "E-DATA-0012 1 row cannot be used: unknown role (first: train.jsonl:1)" in said
    assert 'train.jsonl:1:24  "messages[0].role" is "assitant"' in said
    assert '  = did you mean "assistant"?' in said
    assert check("train.jsonl", "--policy", "skip") == 0
    assert check("train.jsonl", "--policy", "skip", "--strict") == 3


def test_no_more_bad_rows_are_listed_than_asked_for(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean.write_text("nope\n" * 9)
    found = document(capsys, "train.jsonl", "--max-errors", "2")
    assert len(found["bad_rows"]) == 2
    assert found["findings"][0]["count"] == 9


def test_validation_data(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(clean.with_name("val.jsonl"), plain(3, start=38))
    assert check("train.jsonl", "--val", "val.jsonl") == 3
    said = capsys.readouterr().out
    assert "E-DATA-0061 2 rows of the validation data (67 %) trained on as well" in said
    assert "✔ val      val.jsonl 3 rows" in said


def test_the_report_file(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("train.jsonl", "--report", "r.json") == 0
    report = json.loads(Path("r.json").read_text())
    assert (report["schema_version"], report["rows"], report["refused"]) == (1, 40, False)
    assert capsys.readouterr().err.endswith("report in r.json\n")
    assert check("train.jsonl", "--report", "train.jsonl") == 2
    assert clean.read_text().count("\n") == 40


def test_fix(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(clean, [*plain(3), plain(1)[0], {"x": 1}, row("Hi", "A\x08B")])
    before = clean.read_bytes()
    assert check("train.jsonl", "--fix", "out.jsonl", "--report", "r.json", "--strict") == 0
    said = capsys.readouterr().out
    assert (
        "✔ fixed    out.jsonl 4 rows written: unusable rows left out: 1; exact duplicates left out: 1; "
        "rows freed of control characters: 1" in said
    )
    assert "✔ again    0 errors, 0 warnings in the copy" in said
    report = json.loads(Path("r.json").read_text())
    assert report["fix"]["dropped_duplicates"] == 1
    assert (report["errors"], report["fixed"]["errors"]) == (1, 0)
    assert clean.read_bytes() == before
    assert check("train.jsonl", "--fix", "train.jsonl") == 2
    assert check("train.jsonl", "--fix", "out.jsonl") == 2
    assert clean.read_bytes() == before


def test_fix_where_nothing_is_left(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(clean, [{"x": 1}])
    assert check("train.jsonl", "--fix", "out.jsonl") == 3
    assert "--fix out.jsonl was not written: nothing is left" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_lengths_in_tokens(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    found = document(capsys, "train.jsonl", "--model", "model", "--max-length", "20")
    assert found["lengths"]["unit"] == "tokens"
    assert found["lengths"]["limit"] == 20
    assert "W-DATA-0107" in [finding["code"] for finding in found["findings"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-length", "20"], "--max-length counts tokens, so it needs --model"),
        (["--set", "near_row=5"], "did you mean near_rows?"),
        (["--format", "sharegtp"], "did you mean 'sharegpt'?"),
        (["--map", "question"], "is not of the form column=name"),
        (["--map", "a=prompt,b=prompt"], "two columns are to be renamed to 'prompt'"),
    ],
)
def test_mistakes_in_the_command(
    clean: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert check("train.jsonl", *options) == 2
    assert said in capsys.readouterr().err


def test_a_missing_file(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("trian.jsonl") == 3
    assert "did you mean train.jsonl?" in capsys.readouterr().err


def test_secrets_are_never_printed(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret, mail = "AK" + "IA" + "Q" * 16, "jane.doe@posteo.de"
    write(clean, [row("Key?", secret), row("Mail?", mail)])
    check("train.jsonl", "-v", "--report", "r.json")
    check("train.jsonl", "--json")
    said = capsys.readouterr().out + Path("r.json").read_text()
    assert "AWS key" in said
    assert "e-mail address" in said
    assert secret not in said
    assert mail not in said


def test_pairs_and_thresholds(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(clean, [pair(f"Q {i}?", f"{i} and much more of it", f"{i}") for i in range(40)])
    assert "W-DATA-0110" in [f["code"] for f in document(capsys, "train.jsonl")["findings"]]
    assert document(capsys, "train.jsonl", "--set", "longer_share=1")["findings"] == []


REAL = [
    ("alpaca_en_demo.json", 999, "read as Alpaca: columns `instruction`, `input`, `output`, as a conversation", ()),
    ("glaive_toolcall_en_demo.json", 300, "read as ShareGPT: column `conversations` with keys `from`, `value`", ()),
    ("dpo_en_demo.json", 300,
     "read as preference pairs: columns `conversations`, `chosen`, `rejected`, as messages", ()),
    ("kto_en_demo.json", 300, "read as messages: column `messages` with keys `role`, `content`, rated by `label`", ()),
    ("gsm8k_train.jsonl", 7473, "read as prompt-completion: columns `prompt`, `completion`, both text",
     ("--map", "question=prompt,answer=completion")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "described", "options"), REAL)
def test_real_files_are_told_without_a_setting(
    shared_data: Path, capsys: pytest.CaptureFixture[str], name: str, rows: int, described: str, options: Any
) -> None:
    assert check(shared_data / name, "--json", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["usable"], found["errors"]) == (rows, rows, 0)
    assert found["formats"] == {described: rows}
    assert check(shared_data / name, *options) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 40


def test_real_pairs_have_a_prompt_and_two_answers(shared_data: Path) -> None:
    known = all_formats()
    for origin, one in read_rows(str(shared_data / "dpo_en_demo.json")):
        example = detect(one, origin, known).parse(one, origin)
        assert len(example.completions) == 2
        assert isinstance(example.prompt, list)
        assert example.prompt[-1]["role"] == "user"
        for (answer,) in example.completions:
            assert isinstance(answer, dict)
            assert answer["role"] == "assistant"


def test_gsm8k_trains_with_one_line(shared_data: Path) -> None:
    names = {"question": "prompt", "answer": "completion"}
    report = prepare(str(shared_data / "gsm8k_train.jsonl"), plain_tokenizer(), DataSettings(column_map=names)).report
    assert (report.used, report.num_skipped) == (7473, 0)
    assert report.formats == {"read as prompt-completion: columns `prompt`, `completion`, both text": 7473}


def test_columns_are_renamed_for_training(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    write(clean, [{"question": f"{i} + {i} =", "answer": f" {2 * i}"} for i in range(4)])
    Path("run.yaml").write_text(
        "model: {name: model, max_seq_length: 64}\n"
        "dataset: {path: train.jsonl, columns: {question: prompt, answer: completion}}\n"
        "training: {max_steps: 1, bf16: false, save_strategy: 'no'}\n"
    )
    assert main(["train", "run.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert main(["train", "run.yaml", "--set", "dataset.columns=null"]) == 3
    assert "--map question=prompt,answer=completion, or dataset.columns" in capsys.readouterr().err
