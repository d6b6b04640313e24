"""`posttrain chat`: a model, an adapter with its model, and two side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain.cli import main
from posttrain.evaluate.generation import generate_answers
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = chatml_tokenizer()
    model = tiny_model("llama", len(words))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # clear winners, so that rounding decides nothing
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # which knows where it lies
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["chat", *words, "--json", "--max-tokens", "6", "--temperature", "0", "--quiet"]) == 0
    (turn,) = json.loads(capsys.readouterr().out)["turns"]
    return dict(turn["answers"])


def test_it_answers_as_evaluation_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(folder / "model")
    answers = said(capsys, name, "--message", "Say 3")
    words = chatml_tokenizer()
    model = tiny_model("llama", len(words))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    prompt = [{"role": "user", "content": "Say 3"}]
    assert answers == {name: generate_answers(model.bfloat16(), words, [prompt], 6, progress=False)[0]}


def test_an_adapter_speaks_beside_its_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = str(folder / "model"), str(folder / "adapter")
    answers = said(capsys, model, "--compare", adapter, "--message", "Say 3")
    assert set(answers) == {model, adapter}
    assert answers[model] != answers[adapter]


def test_lines_are_messages_until_an_empty_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 3\nSay 4\n\nSay 5\n"))
    assert main(["chat", str(folder / "model"), "--json", "--max-tokens", "4", "--seed", "1", "--system", "Be."]) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert [turn["message"] for turn in turns] == ["Say 3", "Say 4"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 3\n"))
    assert main(["chat", str(folder / "model"), "--max-tokens", "4", "--seed", "1", "--system", "Be."]) == 0
    (answer,) = turns[0]["answers"].values()
    assert answer.strip() in capsys.readouterr().out


def test_a_model_without_a_template_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = chatml_tokenizer()
    words.chat_template = None
    tiny_model("llama", len(words)).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    assert main(["chat", str(folder / "base"), "--message", "Hi"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(["chat", str(folder / "nowhere"), "--message", "Hi"]) == 2
