"""`posttrain chat`: a model, an adapter with its model, and two side by side."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A model with places for 512 tokens."""
    words = chatml_tokenizer()
    tiny_model("gpt2", len(words)).save_pretrained(tmp_path / "short")
    words.save_pretrained(tmp_path / "short")
    return str(tmp_path / "short")


def test_an_answer_ends_where_the_model_s_places_do(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "word " * 60
    while len(chatml_tokenizer()(text)["input_ids"]) < 440:
        text += "word "
    options = ["--temperature", "5", "--max-tokens", "200", "--quiet", "--json"]
    assert main(["chat", short, "--message", text, *options]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["turns"][0]["answers"]) == [short]
    assert err.splitlines()[-1] == (
        f"! {short} has 512 places for tokens, and the conversation fills them: this answer may be cut off, and no "
        "other can follow"
    )
    assert main(["chat", short, "--message", text, "--message", "More?", *options]) == 2
    said = capsys.readouterr().err.splitlines()[-2]
    assert re.fullmatch(f"E-CONFIG-0001 a prompt has 5\\d\\d tokens, and {short} 512 places: there is none .*", said)
    assert main(["chat", short, "--message", "Say 3", *options]) == 0
    assert "places" not in capsys.readouterr().err


def test_a_tokenizer_that_knows_more_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", 9).save_pretrained(tmp_path / "few")
    chatml_tokenizer().save_pretrained(tmp_path / "few")
    assert main(["chat", str(tmp_path / "few"), "--message", "Say 3"]) == 2
    said = capsys.readouterr().err.splitlines()[-2]
    assert said.endswith(f"and {tmp_path / 'few'} embeddings for 9 tokens only")


def rewrite(**changes: Any) -> Callable[[Path], Any]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda adapter: (adapter / "adapter_config.json").write_text("{"),
     "{adapter}/adapter_config.json is no configuration of an adapter: JSONDecodeError: "),
    (lambda adapter: (adapter / "adapter_config.json").write_text("[]"),
     "{adapter}/adapter_config.json is no configuration of an adapter: "),
    (rewrite(peft_type="LORE"), "{adapter}/adapter_config.json is no configuration of an adapter: "),
    (rewrite(base_model_name_or_path=None), "{adapter}/adapter_config.json does not say which model"),
    (rewrite(base_model_name_or_path="/no/such"), "cannot load the model '/no/such'"),
    (lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
     "{adapter} has no adapter_model.safetensors: an adapter without its weights"),
    (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"1234"),
     "{adapter}/adapter_model.safetensors cannot be read: SafetensorError: "),
    (rewrite(r=3), "the adapter in {adapter} cannot be put on {model}: RuntimeError: "),
    (rewrite(target_modules=["nothing"]), "the adapter in {adapter} cannot be put on {model}: "),
]  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("spoil", "message"), BROKEN)
def test_a_broken_adapter_is_named(
    spoil: Callable[[Path], Any], message: str, beside: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = folder / "model", folder / "adapter"
    spoil(adapter)
    words = [str(model), "--compare", str(adapter)] if beside else [str(adapter)]
    assert main(["chat", *words, "--message", "Hi", "--max-tokens", "2", "--quiet"]) == 2
    out, err = capsys.readouterr()
    said, hint = err.splitlines()[-2:]
    assert said.startswith("E-CONFIG-0001 " + message.format(adapter=adapter, model=model))
    assert hint.startswith("  = ")
    assert out == ""
