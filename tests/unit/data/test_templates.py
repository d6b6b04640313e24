"""Named templates: what they render, and that they mark exactly what the assistant says."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.templates import resolve_template
from posttrain.errors import ConfigError
from tests.tiny_tokenizers import CHATML, chatml_tokenizer, plain_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def render(name: str, messages: list, tools: list | None = None, **kwargs: bool) -> str:
    tokenizer = plain_tokenizer()
    template = resolve_template(tokenizer, name)
    return str(tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **kwargs))


def test_chatml_equals_the_usual_one() -> None:
    usual = plain_tokenizer(template=CHATML).apply_chat_template([SYSTEM, *MESSAGES], tokenize=False)
    assert render("chatml", [SYSTEM, *MESSAGES]) == usual
    assert render("chatml", MESSAGES[:1], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_chatml_with_tools() -> None:
    messages = [SYSTEM, MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    text = render("chatml", [*messages, {"role": "tool", "content": "2"}], tools=[CALL])
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>\n{")
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n' in text
    assert text.endswith("<|im_start|>tool\n2<|im_end|>\n")
    assert text.count("Be brief.") == 1


def test_turns_end_with_a_token_that_the_tokenizer_has() -> None:
    tokenizer = plain_tokenizer()
    tokenizer.get_vocab = lambda: {"</s>": 2}  # type: ignore[method-assign]
    template = resolve_template(tokenizer, "chatml")
    text = tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    assert text.endswith("<|im_start|>assistant\nHello</s>\n")


def test_alpaca() -> None:
    text = "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    assert render("alpaca", [SYSTEM, *MESSAGES]) == text


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>\n"), ("alpaca", "</s>\n\n")])
def test_they_mark_what_the_assistant_says(name: str, end: str) -> None:
    tokenizer = plain_tokenizer()
    settings = DataSettings(assistant_only=True, chat_template=name)
    ((tokenized,),) = prepare([{"messages": [SYSTEM, *MESSAGES]}], tokenizer, settings).samples
    branch = tokenized.branches[0]
    assert tokenizer.decode(branch.ids[branch.supervised]) == "Hello" + end


def test_own_template_file_and_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert resolve_template(chatml_tokenizer(), None) is None
    assert resolve_template(chatml_tokenizer(), "auto") is None
    assert resolve_template(plain_tokenizer(), str(file)) == CHATML
    assert resolve_template(plain_tokenizer(), CHATML) == CHATML
    with pytest.raises(ConfigError, match='chat_template="chatml"'):
        resolve_template(plain_tokenizer(), None)
