"""`posttrain data tokens`, run as a user runs it, with a tokenizer out of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.cli import main
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

ROWS = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}\n'
    '{"messages": [{"role": "assitant", "content": "Hello"}]}\n'
)


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    chatml_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(ROWS)
    return [str(tmp_path / "train.jsonl"), "--model", str(tmp_path / "model")]


def test_marks_where_there_is_no_terminal(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "tokens", *given]) == 0
    out = capsys.readouterr().out
    assert "⟦Hello there<|im_end|>↵⟧\n" in out
    assert "\x1b" not in out
    assert out.endswith("⟦trained⟧  masked  ✂cut off✂\n")


def test_colours_where_asked(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["data", "preview", *given, "--color", "always"]) == 0
    assert "\x1b[1;4;32m" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["data", "tokens", *given]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_json(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "tokens", *given, "--json", "--rows", "0-1", "--max-length", "8", "--template", "chatml"]) == 3
    first, second = json.loads(capsys.readouterr().out)
    assert first["counts"]["cut"] == len(first["tokens"]) - 8
    assert {token["state"] for token in first["tokens"]} == {"masked", "cut"}
    assert second["error"]["code"] == "E-DATA-0012"


def test_page(given: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "tokens", *given, "--html", str(tmp_path / "out.html"), "--train-on", "all"]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'out.html'}\n"
    assert '<span class="trained special"' in (tmp_path / "out.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--rows", "7"], "has no row 7"),
        (["--rows", "x"], "cannot be read"),
        (["--template", "chatlm"], "no chat template is called 'chatlm'"),
        (["--template", "llama-3"], "no token of this tokenizer's"),
        (["--format", "mesages"], "unknown data format"),
    ],
)
def test_mistakes(given: list[str], capsys: pytest.CaptureFixture[str], wrong: list[str], says: str) -> None:
    assert main(["data", "tokens", *given, *wrong]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["tokens", "check", "stats"])
def test_the_template_of_another_tokenizer(
    verb: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training takes it: with the end of a sequence, and the special tokens that are missing."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|done|>' }}{% endfor %}" \
               "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # fmt: skip
    other = plain_tokenizer(extra=("<|done|>", "<|user|>", "<|assistant|>"), template=template)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "train.jsonl").write_text(ROWS.splitlines()[0] + "\n")
    assert main(["data", verb, *given, "--chat-template", str(tmp_path / "other"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    if verb == "tokens":
        pieces = [(piece["text"], piece["special"]) for piece in shown[0]["tokens"]]
        assert pieces[0] == ("<|user|>", True)
        assert pieces[-1] == ("<|done|>", True)
    elif verb == "check":
        assert "W-DATA-0121" not in [one["code"] for one in shown["findings"]], "its turns end with a token"
    plain_tokenizer().save_pretrained(tmp_path / "none")
    assert main(["data", verb, *given, "--chat-template", str(tmp_path / "none")]) == 2
    assert "has no chat template" in capsys.readouterr().err
