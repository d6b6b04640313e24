"""What is trained begins where what the model is given ends, whatever marks the template has and whatever arguments a
row gives it.

Every template of the library, marked and without its marks, must train the same characters; the generation prompt that
transformers renders says where they begin.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from posttrain.data.settings import DataSettings
from posttrain.data.templates import resolve_template, without_markers
from posttrain.data.view import RowView, token_view
from tests.tiny_tokenizers import plain_tokenizer
from tests.unit.data.test_template_library import NAMES, tokenizer_of

USER, ANSWER = {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}
AGAIN = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER, ANSWER],
    "several": [USER, ANSWER, *AGAIN],
    "two answers": [USER, ANSWER, {"role": "assistant", "content": "A2"}],
    "thought": [USER, {**ANSWER, "reasoning_content": "hm"}],
    "thought in the content": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA1"}],
    "spaces": [USER, {"role": "assistant", "content": "  A1"}],
}
ARGUMENTS: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
TAKE_TURNS = ("llama-2", "gemma", "gemma-3", "command-r")
"""These refuse two answers in a row."""
DATE = {"date_string": "1 May 2026"}


def marked(view: RowView) -> str:
    assert view.error is None, view.error.message
    runs = (
        (trained, "".join(piece.text for piece in run)) for trained, run in groupby(view.pieces, lambda p: p.trained)
    )
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in runs)


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    return marked(token_view(row, tokenizer, DataSettings(chat_template=name)))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_marks_and_beginnings_train_the_same(name: str, arguments: dict[str, Any]) -> None:
    tokenizer, bare = tokenizer_of(name), tokenizer_of(name)
    bare.chat_template = without_markers(str(resolve_template(bare, name)))
    for kind, messages in CONVERSATIONS.items():
        if kind == "two answers" and name in TAKE_TURNS:
            continue
        row = {"messages": messages, "chat_template_kwargs": {**DATE, **arguments}}
        assert trained(row, tokenizer, name) == trained(row, bare)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_begins_where_the_generation_prompt_ends(name: str, arguments: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(name)
    template = resolve_template(tokenizer, name)
    given = tokenizer.apply_chat_template(
        [USER], chat_template=template, tokenize=False, add_generation_prompt=True, **DATE, **arguments
    )
    for messages in ([USER, ANSWER], [USER, {**ANSWER, "content": "Yes\n\nand no"}]):
        others = {"chat_template_kwargs": {**DATE, **arguments}}
        shown = trained({"messages": messages, **others}, tokenizer, name)
        if "</think>" in given:
            assert shown.startswith(f"{given}⟦{messages[1]['content']}")
        if shown.replace("⟦", "").startswith(given):
            assert shown.startswith(f"{given}⟦")
        split = {"prompt": messages[:1], "completion": messages[1:], **others}
        assert trained(split, tokenizer, name) == shown


def test_thinking_off_is_given_not_trained() -> None:
    row = {"messages": [USER, ANSWER, *AGAIN], "chat_template_kwargs": {"enable_thinking": False, **DATE}}
    assert trained(row, tokenizer_of("qwen-3"), "qwen-3").endswith(
        "assistant\n⟦A1<|im_end|>\n⟧<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦A2<|im_end|>\n⟧"
    )
    assert "assistant\n<think>\n\n</think>\n⟦A1<|im_end|>\n⟧" in trained(row, tokenizer_of("smollm3"), "smollm3")


def test_a_thought_behind_the_empty_one_is_said() -> None:
    view = token_view(
        {
            "messages": CONVERSATIONS["thought in the content"],
            "chat_template_kwargs": {"enable_thinking": False, **DATE},
        },
        tokenizer_of("smollm3"),
        DataSettings(chat_template="smollm3"),
    )
    assert "<think>\n\n</think>\n⟦<think>\nhm" in marked(view)
    assert any("hold a thought behind the empty one" in note for note in view.notes)
    plain = token_view(
        {"messages": CONVERSATIONS["one"]}, tokenizer_of("smollm3"), DataSettings(chat_template="smollm3")
    )
    assert not any("behind the empty one" in note for note in plain.notes)


TULU = (  # Tulu 3's and OLMo 2's own: a line break behind the end of a turn, but for the last
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] }}"
    "{{ eos_token + ('' if loop.last else '\n') }}{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}"
    "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("second", ["A2", "<|assistant|>\nA2", "|", "\nA2"])
def test_the_header_of_a_second_answer_is_not_trained(second: str) -> None:
    """The prompt stands behind a line break that the conversation alone does not end with."""
    row = {"messages": [USER, ANSWER, {"role": "assistant", "content": second}, *AGAIN]}
    assert trained(row, plain_tokenizer(template=TULU)) == (
        f"<s><|user|>\nQ1\n<|assistant|>\n⟦A1</s>⟧\n<|assistant|>\n⟦{second}</s>⟧\n"
        "<|user|>\nQ2\n<|assistant|>\n⟦A2</s>⟧"
    )


def test_the_header_of_a_second_call_is_not_trained() -> None:
    template = TULU.replace("m['content'] }}", "m['content'] }}{{ m.tool_calls | tojson if m.tool_calls else '' }}", 1)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    shown = trained({"messages": [USER, ANSWER, call]}, plain_tokenizer(template=template))
    assert "⟦A1</s>⟧\n<|assistant|>\n⟦[{" in shown
