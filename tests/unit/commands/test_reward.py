"""`posttrain reward test`, as it is typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

GOOD = """
def good(completions, answer, **_):
    return [float(said.strip() == str(one)) for said, one in zip(completions, answer)]
"""
SAME = "! everything that was tried is worth the same ({}): it was not seen to tell anything apart\n"
BAD = "def bad(completions, **_):\n    print('!' * 1000)\n    return [said[0] for said in completions]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": f"Say {n}", "answer": str(n), "right": f"it is {n}", "question": "?"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "two.py").write_text(GOOD + BAD)
    (tmp_path / "broken.py").write_text("import nothing_like_it\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["reward", "test", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("reward", ["good.py", "exact_match", "numeric_answer"])
def test_a_good_one(reward: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ran(capsys, reward, "--data", "rows.jsonl")
    assert (code, err) == (0, "")
    name = reward.removesuffix(".py")
    lines = out.splitlines()
    assert lines[0] == f"reward {name}"
    assert lines[1].split()[:5] == ["right", "answers", "as", "it", "is"]
    assert lines[1].split()[5] == "1"
    assert "  right above wrong in 100.0% of 12 rows (a tie counts half), as it is" in lines
    assert lines[-1] == f"✔ passed   {name}"


def test_a_bad_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ran(capsys, "bad.py", "--data", "rows.jsonl", "--quiet")
    assert code == 1
    assert err.splitlines()[0] == "! it prints: 17017 characters in 17 calls"
    assert "✘ right answers as it is: reward function 'bad' gave '0' for completion 0: '0'" in err
    assert "✘ empty: reward function 'bad' failed: IndexError: string index out of range" in err
    assert out == f"✘ failed   bad, for the {err.count('✘')} reasons above\n"


def test_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ran(capsys, "two.py", "--function", "bad", "--data", "rows.jsonl", "--json")
    said = json.loads(out)
    assert (code, said["reward"], said["passed"]) == (1, "bad", False)
    code, out, _ = ran(capsys, "two.py", "--function", "good", "--data", "rows.jsonl", "--json", "--rows", "5")
    said = json.loads(out)
    assert (code, said["passed"], said["errors"], said["warnings"]) == (0, True, [], [])
    assert said["separation"] == {"form": "as it is", "rows": 5, "share": 1.0, "right": 1.0, "wrong": 0.0}
    assert [trial["name"] for trial in said["trials"]][:5] == [
        "right answers as it is", "wrong answers as it is", "empty", "huge", "every answer at once"
    ]  # fmt: skip


def test_other_columns_and_forms(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(
        "def mine(completions, target, **_):\n"
        "    return [float(said == 'So: ' + one) for said, one in zip(completions, target)]\n"
    )
    words = ["mine.py", "--data", "rows.jsonl", "--map", "right=target"]
    code, _, err = ran(capsys, *words, "--gold", "target")
    assert code == 1
    assert "✘ it does not tell right from wrong" in err
    assert ran(capsys, *words, "--gold", "target", "--as", "So: {gold}")[0] == 0
    code, _, err = ran(capsys, *words, "--gold", "none")
    assert (code, err) == (0, SAME.format(0))


def test_rewards_that_say_nothing_do_not_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = "✘ it says nothing of anything: None for each of {} completions\n"
    (folder / "unsaid.jsonl").write_text("".join(f'{{"prompt": "Say {n}", "answer": null}}\n' for n in range(8)))
    code, out, err = ran(capsys, "numeric_answer", "--data", "unsaid.jsonl", "--quiet")
    assert (code, out) == (1, "✘ failed   numeric_answer, for the reason above\n")
    assert err == (
        "! no right answers in column answer: whether it tells right from wrong was not tried\n" + nothing.format(48)
    )
    (folder / "silent.py").write_text("def silent(completions, **_):\n    return [None] * len(completions)\n")
    assert ran(capsys, "silent.py", "--data", "rows.jsonl", "--gold", "none")[::2] == (1, nothing.format(48))
    (folder / "flat.py").write_text("def flat(completions, **_):\n    return [1.0] * len(completions)\n")
    assert ran(capsys, "flat.py", "--data", "rows.jsonl", "--gold", "none")[::2] == (0, SAME.format(1))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["two.py"], 2, "E-CONFIG-0001 two.py has 2 functions: good, bad\n  = --function NAME says which\n"),
        (["two.py", "--function", "x"], 2, "E-CONFIG-0001 two.py has no function 'x'\n  = it has good, bad\n"),
        (["none.py"], 2, "E-CONFIG-0001 there is no file none.py\n"),
        (["broken.py"], 2, "broken.py cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'\n"),
        (["strange"], 2, "there is no reward 'strange'\n  = a file.py, package.module:function, or one of exact_match"),
        (["numeric_answer", "--function", "x"], 2, "--function names a function of a file"),
        (["good.py", "--gold", "x"], 2, "rows.jsonl has no such column\n  = it has answer, right, question\n"),
        (["good.py", "--as", "x"], 2, "--as 'x' has no {gold}"),
        (["good.py", "--rows", "0"], 2, "--rows and --timeout must be above 0"),
        (["good.py", "--model", "m", "--num-generations", "1"], 2, "--num-generations must be 2 or more"),
        (["posttrain.nothing:f"], 2, "reward_funcs names 'posttrain.nothing:f', which cannot be imported"),
        (["good.py", "--map", "prompt=text"], 3, "has no `prompt` (columns text, answer, right, question)\n"
         "  = --map question=prompt reads another column as the prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried(
    words: list[str], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out, err = ran(capsys, *words, "--data", "rows.jsonl")
    assert given == code
    assert said in err
    assert out == ""


@pytest.mark.parametrize("prompt", [[], ["hi"], [{"role": "user"}], [{"role": "assistant", "content": "a"}]], ids=str)
def test_prompts_that_are_no_messages(prompt: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "odd.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "1"}) + "\n")
    code, out, err = ran(capsys, "numeric_answer", "--data", "odd.jsonl")
    assert code == 3
    assert "odd.jsonl:1" in err
    assert out == ""


@pytest.mark.parametrize("ends", ["import sys\nsys.exit(0)\n", "raise ValueError('no')\n", "def f(:\n"])
@pytest.mark.parametrize("named", ["mine.py", "mine:f"])
def test_a_file_that_cannot_be_imported_is_a_failure(
    ends: str, named: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine.py").write_text(ends)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    code, _, err = ran(capsys, named, "--data", "rows.jsonl")
    assert code == 2
    assert "cannot be imported" in err


def test_samples_of_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = chatml_tokenizer()
    tiny_model("llama", len(words)).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    (folder / "long.py").write_text(
        "def long(completions, **_):\n    return [float(len(one)) for one in completions]\n"
    )
    options = ["--data", "rows.jsonl", "--gold", "none", "--model", "model", "--prompts", "3", "--num-generations", "4",
               "--max-completion-length", "6", "--json"]  # fmt: skip
    made: list[Any] = [json.loads(ran(capsys, "long.py", *options)[1]) for _ in range(2)]
    assert made[0]["signal"] == made[1]["signal"]  # a seed
    assert (made[0]["signal"]["groups"], made[0]["signal"]["size"]) == (3, 4)
    assert made[0]["signal"]["with_signal"] == 3
    assert len(made[0]["trials"][-1]["rewards"]) == 12
    (folder / "tokens.py").write_text(
        "def tokens(completion_ids, **_):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    said = json.loads(ran(capsys, "tokens.py", *options)[1])
    assert 1 <= said["signal"]["lowest"] <= said["signal"]["highest"] <= 6  # tokens of the model's, not bytes
    (folder / "flat.py").write_text("def flat(completions, **_):\n    return [1.0] * len(completions)\n")
    code = main(["reward", "test", "flat.py", *options])
    said = json.loads(capsys.readouterr().out)
    assert code == 1
    assert said["errors"] == [
        "no group would have a signal: in each of 3 groups of 4 samples all rewards are the same (mean 1)"
    ]


@pytest.mark.parametrize(
    ("family", "known", "said"),
    [
        (
            "gpt2",
            None,
            "rows.jsonl[0] has 5 tokens; with max_completion_length=700 that is more than the model's 512 places",
        ),
        ("llama", 9, "and the model embeddings for 9 tokens only"),
    ],
)
def test_samples_that_the_model_cannot_give(
    family: str, known: int | None, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = chatml_tokenizer()
    tiny_model(family, known or len(words)).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    code, out, err = ran(
        capsys, "good.py", "--data", "rows.jsonl", "--model", "model", "--max-completion-length", "700"
    )
    assert (code, out) == (2, "")
    assert said in err
