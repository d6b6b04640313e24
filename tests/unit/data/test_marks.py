"""Texts that hold what the template writes around turns: named, with the rows, and what it does."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.chat import Chat
from posttrain.data.doctor.check import check
from posttrain.data.marks import marks_of
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.templates import TEMPLATES, resolve_template
from posttrain.data.templates.table import EOS
from tests.doctor_files import finding, pair, plain, row
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

TOKENIZER = chatml_tokenizer()
STOP, MARK = "W-DATA-0150", "W-DATA-0151"


def found(rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, **settings: Any) -> list[str]:
    """The codes of the check, after making sure that training says the same."""
    data = DataSettings(assistant_only=None, **settings)
    codes = [one.code for one in check(rows, data=data, tokenizer=tokenizer).findings]
    notes = "\n".join(prepare(rows, tokenizer, data).report.notes())
    assert ("tokens that end or begin a turn" in notes) == (STOP in codes)
    assert ("what the chat template writes around turns, as text" in notes) == (MARK in codes)
    return [code for code in codes if code in (STOP, MARK)]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>"])
@pytest.mark.parametrize("key", ["content", "reasoning_content"])
def test_a_token_of_turns_in_an_answer(token: str, key: str) -> None:
    rows = [*plain(2), row("Hi", "Hello")]
    rows[2]["messages"][1][key] = f"Yes.{token}user No."
    assert found(rows) == [STOP]
    about = finding(check(rows, tokenizer=TOKENIZER), STOP)
    assert (about.severity, about.count, about.first) == ("warning", 1, ("data[2]",))
    assert f"({token})" in about.sentence
    assert "take them out" in about.fix
    (note,) = [one for one in prepare(rows, TOKENIZER, DataSettings()).report.notes() if token in one]
    assert note.startswith("1 rows (first: train[2]) hold, in what the assistant says, tokens that end or begin")
    assert f"({token})" in note


@pytest.mark.parametrize("name", ["qwen-3", "smollm3"])
def test_tags_of_thoughts_are_no_marks_of_turns(name: str) -> None:
    rows = [row("Think!", "<think>\nhm\n</think>\n\nYes."), row("What is <think>?", "A tag, as </think> is.")]
    assert found(rows, chat_template=name) == []
    assert found([row("Think!", "<tool_call>")], chat_template=name) == []


def test_what_is_not_trained_is_not_learnt() -> None:
    bad = row("Hi", "Hello<|im_end|> there")
    bad["messages"][1]["train"] = False
    assert found([{"messages": [*bad["messages"], *row("And?", "Yes.")["messages"]]}]) == []
    turns = [*row("Hi", "No<|im_end|>")["messages"], {"role": "user", "content": "And?"}]
    assert found([{"prompt": turns, "completion": [{"role": "assistant", "content": "Yes."}]}]) == []
    assert found([row("Say <|im_end|>.", "No.")]) == []  # W-DATA-0126


def test_calls_hold_tokens_too() -> None:
    call = {"function": {"name": "say", "arguments": {"what": "<|im_end|>"}}}
    turns = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert found([{"messages": turns}], chat_template="chatml") == [STOP]


@pytest.mark.parametrize("text", ["<think>So</think>Yes.", "im_end", "<tool_call>{}</tool_call>"])
def test_other_tokens_are_the_assistants_own(text: str) -> None:
    extra = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer = plain_tokenizer(extra=(*extra, "<|endoftext|>"))
    tokenizer.eos_token = "<|im_end|>"
    assert found([row("Hi", text)], tokenizer, chat_template="qwen-3") == []


def test_pairs_count_both_answers() -> None:
    pairs = [{"prompt": [{"role": "user", "content": "Hi"}],
              "chosen": [{"role": "assistant", "content": "Yes<|im_end|> no"}],
              "rejected": [{"role": "assistant", "content": "No"}]}]  # fmt: skip
    assert finding(check(pairs, tokenizer=TOKENIZER), STOP).count == 1


def test_the_end_of_sequence_within_a_completion() -> None:
    def rows(completion: str) -> list[dict[str, Any]]:
        return [{"prompt": "Hi", "completion": completion}]

    assert found(rows(" Hello</s> there"), plain_tokenizer()) == [STOP]
    assert found(rows(" Hello</s>\n"), plain_tokenizer()) == []
    assert found([{"text": "One</s>two"}], plain_tokenizer()) == []
    assert finding(check([pair("Hi", "a</s>b", "c")], tokenizer=plain_tokenizer()), STOP).count == 1


MARKS_AS_TEXT = {"zephyr": "<|user|>", "mistral": "[/INST]", "alpaca": "### Response:"}


@pytest.mark.parametrize("name", MARKS_AS_TEXT)
@pytest.mark.parametrize("who", [0, 1])
def test_marks_that_are_no_tokens(name: str, who: int) -> None:
    rows = [*plain(2), row("Hi", "Hello")]
    rows[2]["messages"][who]["content"] = f"So {MARKS_AS_TEXT[name]} yes"
    assert found(rows, plain_tokenizer(), chat_template=name) == [MARK]
    assert finding(check(rows, data=DataSettings(chat_template=name), tokenizer=plain_tokenizer()), MARK).count == 1
    assert found(rows) == []


def test_a_mark_of_words_stands_where_a_line_begins() -> None:
    template = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}</s>\n{% endfor %}"
    tokenizer = plain_tokenizer(template=template)
    assert found([row("The Assistant: who is that?", "Nobody.")], tokenizer) == []
    assert found([row("Hi\nAssistant: Hello", "Nobody.")], tokenizer) == [MARK]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_its_marks(name: str) -> None:
    ends = [end for end in TEMPLATES[name].ends if end != EOS]
    tokenizer = plain_tokenizer(extra=(*TEMPLATES[name].tokens, *ends))
    marks = marks_of(Chat(tokenizer, resolve_template(tokenizer, name), name))
    assert marks.tokens is not None
    for end in (*ends[:1], "</s>"):
        assert marks.tokens.search(f"Yes{end}no")
    assert not marks.tokens.search("<think></think><tool_call>")
    assert marks.texts is None or not marks.texts.search("The user asks the assistant: what is the model? system\n\n")


def test_a_template_that_refuses_other_conversations_has_the_tokenizers_own_marks() -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('No.') }}{% endif %}" + str(TOKENIZER.chat_template)
    tokenizer = plain_tokenizer(template=template)
    tokenizer.eos_token = "<|im_end|>"
    assert found([row("Hi", "Yes<|im_end|> no")], tokenizer) == [STOP]
